#include "ops/timestep_norm/timestep_norm.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;
constexpr double kEps = 1e-5;

TimestepNormState fresh(int64_t B, int64_t G, at::ScalarType type = at::kFloat) {
  return {at::zeros({B}, at::kLong), at::zeros({B, G}, type), at::ones({B, G}, type)};
}

// The recurrence, step by step.
TimestepNormResult by_steps(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const TimestepNormState& state, const std::optional<at::Tensor>& mask) {
  const auto B = x.size(0), L = x.size(1), D = x.size(2), G = state.mean.size(1);
  auto [count, mean, var] = state;
  Tensors ys;
  for (int64_t t = 0; t < L; ++t) {
    const auto x_t = x.select(1, t).view({B, G, D / G});
    const auto m = x_t.mean(-1), s = x_t.var(-1, /*unbiased=*/false);
    const auto c = count.unsqueeze(1).to(x.scalar_type()), n = c + 1;
    const auto new_var = (c * var + s) / n + c / (n * n) * (m - mean).square();
    const auto new_mean = mean + (m - mean) / n;
    const auto counted = mask ? mask->select(1, t).eq(0).unsqueeze(1) : at::ones({B, 1}, at::kBool);
    mean = at::where(counted, new_mean, mean);
    var = at::where(counted, new_var, var);
    count = count + counted.squeeze(1).to(at::kLong);
    const auto normal = (x_t - mean.unsqueeze(-1)) / (var + kEps).sqrt().unsqueeze(-1);
    ys.push_back((normal.view({B, D}) * (1 + weight) + bias).masked_fill(counted.logical_not(), 0));
  }
  return {at::stack(ys, 1), {count, mean, var}};
}

struct Case {
  int64_t B, L, D, G;
  int64_t count = 0;
  bool masked = false;
  double offset = 0, scale = 1;
  at::ScalarType type = at::kFloat;
};

Tensors inputs(const Case& c) {
  const auto statistics = c.type == at::kDouble ? at::kDouble : at::kFloat;
  return {(testing::random({c.B, c.L, c.D}, at::kDouble) * c.scale + c.offset).to(c.type),
          testing::random({c.D}, statistics), testing::random({c.D}, statistics),
          (testing::random({c.B, c.G}, at::kDouble) * c.scale * 0.3 + c.offset).to(statistics),
          testing::random({c.B, c.G}, statistics).square() * c.scale * c.scale};
}

template <class F>
testing::Function with(F op, const Case& c, const std::optional<at::Tensor>& mask) {
  const auto count = at::arange(c.B) + c.count;
  return [op, count, mask](const Tensors& in) {
    const auto [y, state] = op(in[0], in[1], in[2], TimestepNormState{count, in[3], in[4]}, mask);
    return Tensors{y, state.mean, state.var};
  };
}

const auto kOperator = [](const auto&... a) { return timestep_norm(a...); };
const auto kReference = [](const auto&... a) { return timestep_norm_reference(a...); };

std::optional<at::Tensor> mask_of(const Case& c) {
  if (!c.masked) return std::nullopt;
  const auto mask = testing::random({c.B, c.L}).gt(0.3);
  mask.slice(1, 0, 2).fill_(true);      // before anything was counted
  mask.select(0, c.B - 1).fill_(true);  // a sequence without a single counted step
  return mask;
}

TEST(TimestepNorm, ReferenceIsTheRecurrence) {
  for (const Case& c : {Case{2, 9, 6, 3}, Case{2, 9, 6, 2, 5, true}, Case{2, 9, 4, 4, 2}}) {
    const auto mask = mask_of(c);
    testing::expect_agreement(with(kReference, c, mask), with(by_steps, c, mask), inputs(c));
  }
}

TEST(TimestepNorm, GradientsMeetFiniteDifferences) {
  for (const Case& c :
       {Case{2, 7, 6, 3}, Case{2, 7, 6, 2, 5, true}, Case{2, 5, 4, 4, 2}, Case{2, 1, 4, 1, 1}}) {
    auto in = inputs({c.B, c.L, c.D, c.G, c.count, c.masked, 0, 1, at::kDouble});
    testing::expect_gradients(with(kOperator, c, mask_of(c)), in);
  }
}

TEST(TimestepNorm, NamesWhatDoesNotFit) {
  const auto w = at::zeros({6});
  const auto call = [&](const at::Tensor& x, const TimestepNormState& state,
                        const std::optional<at::Tensor>& mask = {}) { timestep_norm(x, w, w, state, mask); };
  const auto x = at::zeros({2, 3, 6});
  testing::expect_error([&] { call(at::zeros({2, 3, 6}, at::kHalf), fresh(2, 3)); },
                        "[timestep_norm] x: float16 is not supported");
  testing::expect_error([&] { call(at::zeros({2, 6}), fresh(2, 3)); },
                        "[timestep_norm] x: expected 3 dimensions");
  testing::expect_error([&] { call(at::zeros({2, 0, 6}), fresh(2, 3)); },
                        "[timestep_norm] x: expected at least one sequence and one step");
  testing::expect_error([&] { call(at::zeros({2, 3, 8}), fresh(2, 4)); },
                        "[timestep_norm] weight: expected shape [8], got [6]");
  testing::expect_error([&] { call(x, fresh(2, 4)); }, "that divides D = 6, got 4");
  testing::expect_error([&] { call(x, fresh(3, 3)); },
                        "[timestep_norm] state.count: expected shape [2], got [3]");
  testing::expect_error([&] { call(x, fresh(2, 6)); }, "[timestep_norm] state.count: expected at least 2");
  testing::expect_error([&] { call(x, {at::full({2}, -1, at::kLong), at::zeros({2, 3}), at::ones({2, 3})}); },
                        "[timestep_norm] state.count: expected at least 0, got -1");
  testing::expect_error([&] { call(x, fresh(2, 3), at::zeros({2, 4}, at::kBool)); },
                        "[timestep_norm] padding_mask: expected shape [2, 3], got [2, 4]");
  testing::expect_error([&] { call(x, fresh(2, 3), at::zeros({2, 3})); },
                        "[timestep_norm] padding_mask: expected bool or uint8");
}

}  // namespace
}  // namespace megalodon::ops
