#include "ops/rms_norm/rms_norm.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

Tensors with_weight(const Tensors& in) {
  return {rms_norm(in[0], in[1])};
}
Tensors without_weight(const Tensors& in) {
  return {rms_norm(in[0], std::nullopt)};
}

TEST(RmsNorm, GradientsMeetFiniteDifferences) {
  const auto x = testing::random({2, 3, 5}, at::kDouble);
  testing::expect_gradients(with_weight, {x, testing::random({5}, at::kDouble)});
  testing::expect_gradients(without_weight, {x});
}

TEST(RmsNorm, MeetsTheFormula) {
  const auto x = at::tensor({3.0f, 4.0f}), w = at::tensor({1.0f, 0.0f});
  const double root = std::sqrt(12.5 + 0.5);
  const auto y = rms_norm(x, w, 0.5);
  EXPECT_FLOAT_EQ(y[0].item<float>(), static_cast<float>(6 / root));
  EXPECT_FLOAT_EQ(y[1].item<float>(), static_cast<float>(4 / root));
}

TEST(RmsNorm, NamesWhatDoesNotFit) {
  testing::expect_error([] { rms_norm(at::zeros({2, 3}), at::zeros({2})); },
                        "[rms_norm] weight: expected shape [3], got [2]");
  testing::expect_error([] { rms_norm(at::zeros({2, 3}), at::zeros({3}, at::kBFloat16)); },
                        "[rms_norm] weight: expected Float, got BFloat16");
  testing::expect_error([] { rms_norm(at::zeros({2, 0}), std::nullopt); },
                        "[rms_norm] x: expected at least one feature");
  testing::expect_error([] { rms_norm(at::zeros({2}, at::kHalf), std::nullopt); },
                        "[rms_norm] x: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
