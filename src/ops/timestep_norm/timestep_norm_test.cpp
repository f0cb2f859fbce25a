#include "ops/timestep_norm/timestep_norm.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "ops/check.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;
constexpr double kEps = 1e-5;

TimestepNormState fresh(int64_t B, int64_t G, at::ScalarType type = at::kFloat) {
  const auto statistics = at::TensorOptions(testing::device()).dtype(type);
  return {at::zeros({B}, statistics.dtype(at::kLong)), at::zeros({B, G}, statistics),
          at::ones({B, G}, statistics)};
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
    const auto counted =
        mask ? mask->select(1, t).eq(0).unsqueeze(1) : at::ones({B, 1}, x.options().dtype(at::kBool));
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
    const auto padding = mask ? std::optional(testing::beside(in[0], *mask)) : std::nullopt;
    const TimestepNormState before{testing::beside(in[0], count), in[3], in[4]};
    const auto [y, state] = op(in[0], in[1], in[2], before, padding);
    return Tensors{y, state.mean, state.var};
  };
}

const auto kOperator = [](const auto&... a) { return timestep_norm(a...); };
const auto kReference = [](const auto&... a) { return timestep_norm_reference(a...); };

std::optional<at::Tensor> mask_of(const Case& c) {
  if (!c.masked) return std::nullopt;
  auto mask = testing::random({c.B, c.L}).gt(0.3);
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

TEST(TimestepNorm, AgreesWithReference) {
  const std::vector<Case> cases = {
      {1, 1, 4, 1},
      {1, 1, 512, 32, 100},
      {2, 300, 48, 6},
      {7, 65, 33, 3, 0, true},
      {3, 40, 35, 5, 4},
      {1, 70, 384, 32, 0},
      {2, 20, 130, 65, 3},
      {2, 33, 16, 1, 0, true},
      {2, 9, 7, 7, 2, true},
      {1, 5, 1, 1, 2},
      {2, 130, 200, 100, 1},
      {3, 64, 96, 2, 1000000},
      {2, 70, 600, 1, 0, true},
      {1, 129, 1548, 6, 2},
      {2, 2200, 24, 3, 1, true},
      {1, 4200, 8, 1},
      {3, 1100, 1152, 48, 2, true},
      {2, 1100, 256, 4, 0, true},  // clusters of blocks on a GPU; the last sequence is padding
      {1, 4200, 128, 4, 3},
  };
  for (auto c : cases) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      c.type = type;
      const auto mask = mask_of(c);
      SCOPED_TRACE(at::str("B ", c.B, " L ", c.L, " D ", c.D, " G ", c.G, " count ", c.count, " ", type));
      testing::expect_agreement(with(kOperator, c, mask), with(kReference, c, mask), inputs(c));
    }
  }
}

// Gradients of x passed on are added to that of x; a gradient that nobody has counts as none.
TEST(TimestepNorm, PassesItsInputOn) {
  for (const auto type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const auto& [B, L, D, G] :
         {std::array<int64_t, 4>{1, 1, 6, 3}, {2, 33, 40, 8}, {1, 70, 256, 4}, {2, 40, 700, 1}}) {
      for (const std::size_t passed : {0, 1, 2}) {
        SCOPED_TRACE(at::str(type, " ", B, " ", L, " ", D, " ", G, ", passed ", passed));
        const Case c{.B = B, .L = L, .D = D, .G = G, .type = type};
        auto in = inputs(c);
        const auto dy = testing::random({B, L, D}, type), first = testing::random({B, L, D}, type),
                   second = testing::random({B, L, D}, type);
        const auto gradients = [&](bool passes) {
          Tensors leaves;
          for (const auto& x : {in[0], in[1], in[2]})
            leaves.push_back(x.detach().clone().set_requires_grad(true));
          const auto& x = leaves[0];
          const auto state = fresh(B, G, statistics_type(x));
          Tensors results, upstream{dy, first, second};
          if (passes) {
            const auto [result, again, once_more] =
                timestep_norm_and_pass(x, leaves[1], leaves[2], state, kEps);
            EXPECT_TRUE(at::equal(again, x) && at::equal(once_more, x));
            results = {result.y, again, once_more};
          } else {
            results = {timestep_norm(x, leaves[1], leaves[2], state, {}, kEps).y, x, x};
          }
          results.resize(1 + passed), upstream.resize(results.size());
          return torch::autograd::grad(results, leaves, upstream);
        };
        const testing::PoisonedMemory poisoned;
        const auto want = gradients(false), got = gradients(true);
        for (std::size_t i = 0; i < want.size(); ++i)
          EXPECT_LE(testing::relative_error(got[i], want[i]), type == at::kBFloat16 ? 1e-2 : 1e-6) << i;
      }
    }
  }
}

TEST(TimestepNorm, StateAloneHasGradients) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const Case c{.B = 2, .L = 70, .D = 64, .G = 4, .count = 3, .type = type};
    const auto of_state = [&](auto op) {
      return [op, &c](const Tensors& in) {
        const auto out = with(op, c, {})(in);
        return Tensors{out[1], out[2]};
      };
    };
    const auto gradients = [&](const auto& f, const Tensors& in) {
      Tensors leaves;
      for (const auto& x : in) leaves.push_back(x.detach().clone().set_requires_grad(true));
      const auto out = f(leaves);
      return torch::autograd::grad({out[0].sum() + out[1].square().sum()}, {leaves[0], leaves[3], leaves[4]});
    };
    const auto in = inputs(c);
    Tensors in64;
    for (const auto& x : in) in64.push_back(x.cpu().to(at::kDouble));
    const auto want = gradients(of_state(kReference), in64), got = gradients(of_state(kOperator), in);
    for (std::size_t i = 0; i < want.size(); ++i)
      EXPECT_LE(testing::relative_error(got[i], want[i]), type == at::kFloat ? 5e-6 : 1.5e-2) << i;
  }
}

TEST(TimestepNorm, OneStepAgreesWithReferenceWithoutGradients) {
  const at::NoGradGuard no_grad;
  for (auto c : {Case{1, 1, 2048, 64, 7}, {5, 1, 36, 4}, {40, 1, 64, 32, 1000000}, {2, 1, 1300, 2, 3}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      c.type = type;
      const auto in = inputs(c);
      Tensors in64;
      for (const auto& x : in) in64.push_back(x.cpu().to(at::kDouble));
      const auto want = with(kReference, c, {})(in64);
      const testing::PoisonedMemory poisoned;
      const auto got = with(kOperator, c, {})(in);
      for (std::size_t i = 0; i < want.size(); ++i)
        EXPECT_LE(testing::relative_error(got[i], want[i]), type == at::kFloat ? 5e-6 : 1.5e-2) << i;
    }
  }
}

TEST(TimestepNorm, AgreesAtEveryScale) {
  for (const double scale : {1e-4, 1e-2, 1e4}) {
    const Case c{2, 100, 32, 4, 0, true, 0, scale};
    const auto mask = mask_of(c);
    SCOPED_TRACE(scale);
    testing::expect_agreement(with(kOperator, c, mask), with(kReference, c, mask), inputs(c));
  }
  // The cumulative mean is a float32: 100 is known to 4e-6 of a deviation.
  const Case c{2, 100, 32, 4, 3, false, 100};
  testing::expect_agreement(with(kOperator, c, {}), with(kReference, c, {}), inputs(c), 2e-5);
}

TEST(TimestepNorm, ConstantInputsAreZeroWithoutNan) {
  const auto w = at::zeros({8}, testing::device()),
             x = at::full({1, 50, 8}, 3.0, testing::device()).set_requires_grad(true);
  const auto [y, state] = timestep_norm(x, w, w, fresh(1, 2));
  EXPECT_EQ(y.abs().max().item<float>(), 0);
  EXPECT_EQ(state.var.abs().max().item<float>(), 0);
  y.sum().backward();
  EXPECT_TRUE(x.grad().isfinite().all().item<bool>());
}

TEST(TimestepNorm, PaddingIsZeroAndLeavesTheRestAlone) {
  const Case c{2, 12, 8, 2};
  auto in = inputs(c);
  const auto x = in[0].slice(0, 0, 1);
  const auto &w = in[1], &b = in[2];
  const auto mask = at::zeros({1, 12}, at::TensorOptions(x.device()).dtype(at::kByte));
  for (const int64_t t : {0, 1, 5, 11}) mask[0][t] = 1;
  const auto kept = mask.eq(0).nonzero().select(1, 1);
  auto padded_x = x.masked_fill(mask.ne(0).unsqueeze(-1), NAN).set_requires_grad(true);
  const auto [y, state] = timestep_norm(padded_x, w, b, fresh(1, 2), mask);
  const auto want = timestep_norm(x.index_select(1, kept), w, b, fresh(1, 2));
  EXPECT_TRUE(y.index_select(1, kept).equal(want.y));
  EXPECT_TRUE(state.mean.equal(want.state.mean) && state.var.equal(want.state.var));
  EXPECT_TRUE(state.count.equal(want.state.count));
  EXPECT_EQ(y.masked_select(mask.ne(0).unsqueeze(-1)).count_nonzero().item<int64_t>(), 0);
  const auto upstream = at::ones_like(y).masked_fill(mask.ne(0).unsqueeze(-1), NAN);
  y.backward(upstream);
  EXPECT_TRUE(padded_x.grad().isfinite().all().item<bool>());
  EXPECT_EQ(padded_x.grad().masked_select(mask.ne(0).unsqueeze(-1)).abs().sum().item<float>(), 0);
}

TEST(TimestepNorm, PiecesAreTheWhole) {
  const Case c{3, 257, 24, 4};
  const auto in = inputs(c);
  const auto whole = timestep_norm(in[0], in[1], in[2], fresh(3, 4));
  auto state = fresh(3, 4);
  Tensors ys;
  int64_t begin = 0;
  for (const int64_t end : {1, 2, 30, 31, 200, 257}) {
    const auto piece = timestep_norm(in[0].slice(1, begin, end), in[1], in[2], state);
    ys.push_back(piece.y);
    state = piece.state;
    begin = end;
  }
  EXPECT_LE(testing::relative_error(at::cat(ys, 1), whole.y), 5e-7);
  EXPECT_LE(testing::relative_error(state.mean, whole.state.mean), 5e-7);
  EXPECT_LE(testing::relative_error(state.var, whole.state.var), 5e-7);
  EXPECT_TRUE(state.count.equal(whole.state.count));
}

TEST(TimestepNorm, StaysAccurateOverLongSequences) {
  const Case c{1, 100000, 8, 2, 0, false, 3};
  testing::expect_agreement(with(kOperator, c, {}), with(kReference, c, {}), inputs(c));
}

TEST(TimestepNorm, TwoRunsGiveTheSameBits) {
  const Case c{3, 2200, 48, 6};
  auto in = inputs(c);
  Tensors first;
  for (int run = 0; run < 2; ++run) {
    Tensors leaves;
    for (const auto& x : in) leaves.push_back(x.detach().clone().set_requires_grad(true));
    const auto out = with(kOperator, c, {})(leaves);
    (out[0].square().sum() + out[1].sum() + out[2].sum()).backward();
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      if (run == 0) first.push_back(leaves[i].grad());
      EXPECT_TRUE(leaves[i].grad().equal(first[i])) << i;
    }
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
