#include "ops/norm_cema_step/norm_cema_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

struct Shape {
  int64_t B, D, G, N;
};

// Inputs and state, and after `steps` steps the outputs of each and the state.
Tensors after(const Tensors& in, const std::vector<int64_t>& count, int64_t steps,
              decltype(norm_cema_step)* step, bool early = false) {
  const auto& x = in[0];  // [B, steps, D]
  TimestepNormState state{testing::beside(x, at::tensor(count, at::kLong)), in[7].clone(), in[8].clone()};
  const auto h = in[9].clone();
  const auto complex = [](const at::Tensor& t) { return at::view_as_complex(t); };
  const NormCemaParameters parameters{in[1],          in[2],          1e-5,  in[3],
                                      complex(in[4]), complex(in[5]), in[6], early};
  Tensors out;
  for (int64_t t = 0; t < steps; ++t) {
    auto x_t = x.narrow(1, t, 1);
    if (early) x_t = x_t.clone();  // launched last
    const auto result = step(x_t, parameters, state, h);
    out.push_back(result.normal);
    out.push_back(result.y);
    state.count = result.count;
  }
  out.insert(out.end(), {state.count, state.mean, state.var, h});
  return out;
}

TEST(NormCemaStep, AgreesWithTheOperators) {
  const at::NoGradGuard no_grad;
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [B, D, G, N] : {Shape{1, 2048, 64, 16},
                                     {3, 96, 8, 8},
                                     {17, 40, 4, 4},
                                     {2, 36, 3, 12},
                                     {1, 4, 4, 16},
                                     {2, 21, 3, 5},
                                     {32, 256, 4, 16},
                                     {32, 2048, 64, 16}}) {
      constexpr int64_t kSteps = 3;
      const auto angle = testing::random({D, N}) * 3, radius = at::sigmoid(testing::random({D, N}));
      const Tensors in{testing::random({B, kSteps, D}, type),
                       testing::random({D}),
                       testing::random({D}),
                       at::sigmoid(testing::random({D, N})),
                       at::stack({radius * angle.cos(), radius * angle.sin()}, -1),
                       testing::random({D, N, 2}),
                       testing::random({D}),
                       testing::random({B, G}),
                       testing::random({B, G}).square() + 0.5,
                       testing::random({B, D, N, 2})};
      Tensors in64;
      for (const auto& x : in) in64.push_back(x.cpu().to(at::kDouble));
      std::vector<int64_t> count(static_cast<std::size_t>(B));
      for (int64_t b = 0; b < B; ++b) count[static_cast<std::size_t>(b)] = 2 + b * b * 1000003;
      const auto want = after(in64, count, kSteps, norm_cema_step_reference);
      for (const bool early : {false, true}) {
        const testing::PoisonedMemory poisoned;
        const auto got = after(in, count, kSteps, norm_cema_step, early);
        for (std::size_t i = 0; i < want.size(); ++i) {
          ASSERT_EQ(got[i].sizes(), want[i].sizes());
          EXPECT_LE(testing::relative_error(got[i], want[i]), type == at::kFloat ? 5e-6 : 2e-2)
              << "output " << i << ": " << B << " x " << D << ", " << G << " groups, " << N << " components, "
              << type << (early ? ", early" : "");
        }
      }
    }
  }
}

TEST(NormCemaStep, NamesWhatDoesNotFit) {
  const auto c = at::zeros({8, 4}, at::kComplexFloat);
  const NormCemaParameters p{at::zeros({8}), at::zeros({8}), 1e-5, at::zeros({8, 4}), c, c, at::zeros({8})};
  const TimestepNormState state{at::zeros({1}, at::kLong), at::zeros({1, 2}), at::ones({1, 2})};
  testing::expect_error([&] { norm_cema_step(at::zeros({1, 2, 8}), p, state, at::zeros({1, 8, 4, 2})); },
                        "[norm_cema_step] x: expected shape [1, 1, 8], got [1, 2, 8]");
  testing::expect_error([&] { norm_cema_step(at::zeros({1, 1, 8}), p, state, at::zeros({1, 8, 4})); },
                        "[norm_cema_step] h: expected shape [1, 8, 4, 2], got [1, 8, 4]");
}

}  // namespace
}  // namespace megalodon::ops
