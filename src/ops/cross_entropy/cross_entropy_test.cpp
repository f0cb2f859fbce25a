#include "ops/cross_entropy/cross_entropy.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

at::Tensor targets_for(int64_t T, int64_t V) {
  auto targets = at::arange(T).remainder(V);
  if (T > 2) targets[T / 2] = kIgnoredTarget;
  return targets.to(testing::device());
}

TEST(CrossEntropy, GradientsMeetFiniteDifferences) {
  const auto targets = targets_for(5, 7);
  testing::expect_gradients([&](const Tensors& in) { return Tensors{cross_entropy(in[0], targets)}; },
                            {testing::random({5, 7}, at::kDouble)});
}

TEST(CrossEntropy, AgreesWithReference) {
  for (const auto& [T, V] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 2}, {7, 33}, {300, 256}, {5, 2500}, {0, 4}}) {
    for (const double scale : {1e-3, 1.0, 10.0}) {
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(at::str(T, " x ", V, ", scale ", scale, " ", type));
        const auto targets = targets_for(T, V);
        testing::expect_agreement(
            [&](const Tensors& in) { return Tensors{cross_entropy(in[0], targets)}; },
            [&](const Tensors& in) {
              return Tensors{cross_entropy_reference(in[0], testing::beside(in[0], targets))};
            },
            {(testing::random({T, V}) * scale - 50).to(type)});
      }
    }
  }
}

// The target's logit leads by 20: nll and its gradient are some 1e-9.
TEST(CrossEntropy, LeavesPaddingOut) {
  for (const auto& [V, padding] :
       {std::pair<int64_t, int64_t>{102, 2}, {33, 7}, {5, 3}, {1030, 1}, {16, 0}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(V, " + ", padding, " ", type));
      const auto targets = targets_for(40, V);
      auto logits = testing::random({40, V + padding}, type);
      logits.narrow(1, V, padding).mul_(100);
      testing::expect_agreement(
          [&](const Tensors& in) { return Tensors{cross_entropy(in[0], targets, padding)}; },
          [&](const Tensors& in) {
            return Tensors{cross_entropy_reference(in[0].narrow(1, 0, V), testing::beside(in[0], targets))};
          },
          {logits});
    }
  }
  testing::expect_error([] { cross_entropy(at::zeros({1, 3}), at::zeros({1}, at::kLong), 3); },
                        "expected at least one class");
}

TEST(CrossEntropy, IsAccurateWhereTheTargetIsNearlySure) {
  const auto logits = at::zeros({1, 3}, at::TensorOptions(testing::device()).dtype(at::kDouble));
  const auto targets = at::zeros({1}, logits.options().dtype(at::kLong));
  logits[0][0] = 20;
  const auto gradient = [&](at::ScalarType type) {
    auto leaf = logits.to(type).clone().set_requires_grad(true);
    cross_entropy(leaf, targets).sum().backward();
    return leaf.grad();
  };
  EXPECT_LE(testing::relative_error(gradient(at::kFloat), gradient(at::kDouble)), 2e-6);
  EXPECT_FLOAT_EQ(cross_entropy(logits.to(at::kFloat), targets).item<float>(),
                  static_cast<float>(std::log1p(2 * std::exp(-20.0))));
}

TEST(CrossEntropy, ShowsNotANumber) {
  const auto logits = testing::random({3, 40}), targets = at::zeros({3}, logits.options().dtype(at::kLong));
  logits[1][7] = NAN;
  const auto nll = cross_entropy(logits, targets);
  EXPECT_TRUE(nll.isnan().cpu().equal(at::tensor({0, 1, 0}).to(at::kBool)));
}

TEST(CrossEntropy, IgnoresWithoutGradient) {
  auto logits = at::full({2, 5}, INFINITY, testing::device());
  logits[1].fill_(1);
  logits.set_requires_grad(true);
  const auto nll =
      cross_entropy(logits, at::tensor({kIgnoredTarget, int64_t{3}}, at::kLong).to(logits.device()));
  EXPECT_EQ(nll[0].item<float>(), 0);
  nll.sum().backward();
  EXPECT_EQ(logits.grad()[0].abs().sum().item<float>(), 0);
}

TEST(CrossEntropy, IsTorchs) {
  const auto logits = testing::random({9, 21}), targets = targets_for(9, 21);
  const auto want = at::cross_entropy_loss(logits, targets, {}, at::Reduction::None, kIgnoredTarget);
  EXPECT_LE(testing::relative_error(cross_entropy(logits, targets), want), 1e-6);
}

TEST(CrossEntropy, NamesWhatDoesNotFit) {
  const auto logits = at::zeros({3, 4});
  testing::expect_error([&] { cross_entropy(logits, at::tensor({0, -100, 4}, at::kLong)); },
                        "[cross_entropy] targets: expected 0 to 3, or -100 to ignore, got 4 at position 2");
  testing::expect_error([&] { cross_entropy(logits, at::tensor({0, -1, 4}, at::kLong)); },
                        "got -1 at position 1");
  testing::expect_error([&] { cross_entropy(logits, at::zeros({2}, at::kLong)); },
                        "[cross_entropy] targets: expected shape [3], got [2]");
  testing::expect_error([&] { cross_entropy(logits, at::zeros({3}, at::kInt)); },
                        "[cross_entropy] targets: expected Long, got Int");
  testing::expect_error([&] { cross_entropy(logits.to(at::kHalf), at::zeros({3}, at::kLong)); },
                        "[cross_entropy] logits: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
