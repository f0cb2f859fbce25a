#include "ops/attention_step/attention_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

struct Shape {
  int64_t B, H, dz, dv, C, chunk;
};

// The results of some steps from `start` on, and the cache after them.
Tensors after(const Tensors& in, const std::vector<int64_t>& start, int64_t chunk,
              decltype(attention_step)* step) {
  const AttentionCache cache{in[3].clone(), in[4].clone()};
  const auto position = testing::beside(in[0], at::tensor(start, at::kLong));
  Tensors out;
  for (int64_t t = 0; t < in[0].size(1); ++t) {
    const auto at_step = [&](const at::Tensor& x) { return x.narrow(1, t, 1).contiguous(); };
    out.push_back(step(at_step(in[0]), {in[5], in[6], chunk, 1e4, 1e-5}, at_step(in[1]), at_step(in[2]),
                       position + t, cache));
  }
  out.insert(out.end(), {cache.k, cache.v});
  return out;
}

TEST(AttentionStep, AgreesWithTheOperators) {
  const at::NoGradGuard no_grad;
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [B, H, dz, dv, C, chunk] : {Shape{1, 2, 256, 2048, 600, 600},
                                                 {5, 3, 64, 128, 20, 16},
                                                 {2, 1, 8, 8, 3, 3},
                                                 {3, 2, 24, 40, 16, 16},
                                                 {9, 4, 256, 512, 40, 40},
                                                 {1, 1, 320, 72, 7, 5},
                                                 {1, 1, 8, 16, 3000, 3000},
                                                 {70, 2, 8, 16, 5, 5},
                                                 {4, 2, 6, 10, 12, 8}}) {
      constexpr int64_t kSteps = 4;
      const Tensors in{testing::random({B, kSteps, H, dz}, type),  testing::random({B, kSteps, H, dv}, type),
                       testing::random({B, kSteps, H * dv}, type), testing::random({B, C, H, dz}, type),
                       testing::random({B, C, H, dv}, type),       testing::random({2, H * dz}) * 0.1,
                       testing::random({2, H * dz}) * 0.1};
      Tensors in64;
      for (const auto& x : in) in64.push_back(x.cpu().to(at::kDouble));
      for (const int64_t first :
           {int64_t{0}, chunk - 2, 1000 * chunk + chunk / 2, (int64_t{1} << 40) * chunk - 1}) {
        if (first < 0) continue;
        std::vector<int64_t> start(static_cast<std::size_t>(B));
        for (int64_t b = 0; b < B; ++b) start[static_cast<std::size_t>(b)] = first + b * b;
        const auto want = after(in64, start, chunk, attention_step_reference);
        const testing::PoisonedMemory poisoned;
        const auto got = after(in, start, chunk, attention_step);
        for (std::size_t i = 0; i < want.size(); ++i) {
          ASSERT_EQ(got[i].sizes(), want[i].sizes());
          EXPECT_LE(testing::relative_error(got[i], want[i]), type == at::kFloat ? 1e-5 : 2e-2)
              << "output " << i << ": " << B << " x " << H << " heads of " << dz << "/" << dv << ", chunk "
              << chunk << " of " << C << " at " << first << " " << type;
        }
      }
    }
  }
}

TEST(AttentionStep, NamesWhatDoesNotFit) {
  const auto z = at::zeros({1, 1, 2, 8}), v = at::zeros({1, 1, 2, 4}), gate = at::zeros({1, 1, 8});
  const AttentionCache cache{at::zeros({1, 6, 2, 8}), at::zeros({1, 6, 2, 4})};
  const auto start = at::zeros({1}, at::kLong), parameters = at::zeros({2, 16});
  testing::expect_error(
      [&] { attention_step(z, {parameters, parameters, 7, 1e4, 1e-5}, v, gate, start, cache); },
      "[attention_step] chunk: expected 1 to the cache's 6 slots, got 7");
  testing::expect_error(
      [&] { attention_step(z, {parameters, parameters, 6, 1e4, 1e-5}, v, v, start, cache); },
      "[attention_step] gate: expected shape [1, 1, 8], got [1, 1, 2, 4]");
}

}  // namespace
}  // namespace megalodon::ops
