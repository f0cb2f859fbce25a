#include "ops/cross_entropy/cross_entropy.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

at::Tensor targets_for(int64_t T, int64_t V) {
  auto targets = at::arange(T).remainder(V);
  if (T > 2) targets[T / 2] = kIgnoredTarget;
  return targets;
}

TEST(CrossEntropy, GradientsMeetFiniteDifferences) {
  const auto targets = targets_for(5, 7);
  testing::expect_gradients([&](const Tensors& in) { return Tensors{cross_entropy(in[0], targets)}; },
                            {testing::random({5, 7}, at::kDouble)});
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
