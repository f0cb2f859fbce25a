#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <gtest/gtest.h>

#include "ops/cross_entropy/cross_entropy.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

// Every third is ignored.
at::Tensor targets_for(int64_t N, int64_t V) {
  auto targets = at::arange(N).remainder(V);
  targets.masked_fill_(at::arange(N).remainder(3).eq(1), kIgnoredTarget);
  return targets.to(testing::device());
}

struct Case {
  int64_t K, N, D, V, logits_at_once;  // K = 0: not stacked
  at::Tensor weight(at::ScalarType type) const {
    const auto w = testing::random({std::max<int64_t>(K, 1), V, D}, type);
    return K == 0 ? w.squeeze(0) : w;
  }
};

TEST(LinearCrossEntropy, GradientsMeetFiniteDifferences) {
  for (const auto& c : {Case{0, 5, 3, 7, 1}, {2, 6, 3, 4, 1}}) {
    const auto targets = targets_for(c.N, c.V);
    testing::expect_gradients(
        [&](const Tensors& in) { return Tensors{linear_cross_entropy(in[0], in[1], targets)}; },
        {testing::random({c.N, c.D}, at::kDouble), c.weight(at::kDouble)});
  }
}

// The largest block is as the default makes it for these sizes; a row's logits may be more than all at once.
TEST(LinearCrossEntropy, AgreesWithReference) {
  for (const auto& c : {Case{0, 1, 1, 1, 1},
                        {0, 7, 5, 33, 66},
                        {0, 300, 64, 257, 32896},
                        {0, 64, 32, 40, 1 << 26},
                        {0, 12, 9, 50, 3},
                        {3, 15, 8, 11, 22},
                        {2, 400, 48, 100, 9999}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(c.K, " x ", c.N, " x ", c.D, " x ", c.V, " ", c.logits_at_once, " ", type));
      const auto targets = targets_for(c.N, c.V);
      // Weights that bfloat16 holds, so that the cast is not what is measured.
      testing::expect_agreement(
          [&](const Tensors& in) {
            return Tensors{linear_cross_entropy(in[0], in[1], targets, c.logits_at_once)};
          },
          [&](const Tensors& in) {
            return Tensors{linear_cross_entropy_reference(in[0], in[1], testing::beside(in[0], targets))};
          },
          {testing::random({c.N, c.D}, type), c.weight(at::kBFloat16).to(at::kFloat)});
    }
  }
}

TEST(LinearCrossEntropy, OfNoTargetIsZeroWithoutGradient) {
  const auto hidden = testing::random({4, 3}).set_requires_grad(true);
  const auto weight = testing::random({2, 5, 3}).set_requires_grad(true);
  auto targets = at::full({4}, kIgnoredTarget, hidden.options().dtype(at::kLong).requires_grad(false));
  targets[3] = 2;  // the second model has one
  const auto loss = linear_cross_entropy(hidden, weight, targets);
  EXPECT_EQ(loss[0].item<float>(), 0);
  EXPECT_GT(loss[1].item<float>(), 0);
  loss.sum().backward();
  EXPECT_EQ(hidden.grad().narrow(0, 0, 3).abs().sum().item<float>(), 0);
  EXPECT_EQ(weight.grad()[0].abs().sum().item<float>(), 0);
  EXPECT_GT(weight.grad()[1].abs().sum().item<float>(), 0);
}

TEST(LinearCrossEntropy, RefusesASecondBackwardPass) {
  const auto hidden = testing::random({4, 3}).set_requires_grad(true), weight = testing::random({5, 3});
  const auto loss = linear_cross_entropy(hidden, weight, targets_for(4, 5));
  loss.backward({}, /*keep_graph=*/true);
  testing::expect_error([&] { loss.backward(); }, "modified by an inplace operation");
}

TEST(LinearCrossEntropy, IsTheSameWithoutGradients) {
  const auto hidden = testing::random({10, 6}, at::kBFloat16), weight = testing::random({9, 6});
  const auto targets = targets_for(10, 9);
  const auto leaf = weight.clone().set_requires_grad(true);
  EXPECT_TRUE(at::equal(linear_cross_entropy(hidden, weight, targets, 27),
                        linear_cross_entropy(hidden, leaf, targets, 27).detach()));
}

// The mean over 6000 x 1000 logits with its gradients takes less than a quarter of what the logits would.
TEST(LinearCrossEntropy, NeverHoldsAllLogits) {
  if (!testing::device().is_cpu()) GTEST_SKIP() << "counts memory of the CPU";
  constexpr int64_t N = 6000, V = 1000, D = 16;
  const auto hidden = testing::random({N, D}).set_requires_grad(true);
  const auto weight = testing::random({V, D}).set_requires_grad(true);
  const auto targets = targets_for(N, V);
  const testing::CountedMemory memory;
  linear_cross_entropy(hidden, weight, targets, 500 * V).backward();
  EXPECT_LT(memory.peak(), N * V * 4 / 4);
}

TEST(LinearCrossEntropy, NamesWhatDoesNotFit) {
  const auto hidden = at::zeros({3, 2}), weight = at::zeros({4, 2});
  testing::expect_error(
      [&] { linear_cross_entropy(hidden, weight, at::tensor({0, -100, 4}, at::kLong)); },
      "[linear_cross_entropy] targets: expected 0 to 3, or -100 to ignore, got 4 at position 2");
  testing::expect_error([&] { linear_cross_entropy(hidden, at::zeros({4, 3}), at::zeros({3}, at::kLong)); },
                        "[linear_cross_entropy] weight: expected shape [any, 2], got [4, 3]");
  testing::expect_error(
      [&] { linear_cross_entropy(hidden, weight.to(at::kBFloat16), at::zeros({3}, at::kLong)); },
      "[linear_cross_entropy] weight: expected Float, got BFloat16");
  testing::expect_error(
      [&] { linear_cross_entropy(hidden, at::zeros({2, 4, 2}), at::zeros({3}, at::kLong)); },
      "expected a number of models that divides the 3 rows of hidden, got 2");
  testing::expect_error([&] { linear_cross_entropy(hidden, weight, at::zeros({2}, at::kLong)); },
                        "[linear_cross_entropy] targets: expected shape [3], got [2]");
}

}  // namespace
}  // namespace megalodon::ops
