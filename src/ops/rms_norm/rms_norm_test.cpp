#include "ops/rms_norm/rms_norm.h"

#include <ATen/Parallel.h>
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

Tensors with_weight_reference(const Tensors& in) {
  return {rms_norm_reference(in[0], in[1])};
}
Tensors without_weight_reference(const Tensors& in) {
  return {rms_norm_reference(in[0], std::nullopt)};
}

TEST(RmsNorm, AgreesWithReference) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{1},
                                            {5, 1},
                                            {7, 3},
                                            {4, 16},
                                            {2, 3, 67},
                                            {1, 2, 3, 192},
                                            {129, 48},
                                            {5000, 33},
                                            {13, 2048},
                                            {6, 1001},
                                            {5, 7000}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(at::IntArrayRef(shape), " ", type));
      // One feature: y is nearly the sign of x, and the gradient cancels, where x is beyond sqrt(eps).
      const auto x = testing::random(shape, type) * (shape.back() == 1 ? 1e-3 : 1.0);
      testing::expect_agreement(with_weight, with_weight_reference, {x, testing::random({shape.back()})});
      testing::expect_agreement(without_weight, without_weight_reference, {x});
    }
  }
}

TEST(RmsNorm, GivesEachShareOfTheRowsItsWeight) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    testing::expect_agreement(with_weight, with_weight_reference,
                              {testing::random({3, 70, 33}, type), testing::random({3, 33})});
    testing::expect_agreement(with_weight, with_weight_reference,
                              {testing::random({6, 5, 16}, type), testing::random({3, 16})});
  }
  testing::expect_gradients(with_weight,
                            {testing::random({4, 2, 5}, at::kDouble), testing::random({2, 5}, at::kDouble)});
  const auto x = testing::random({4, 8}), w = testing::random({2, 8});
  EXPECT_TRUE(at::equal(rms_norm(x, w).narrow(0, 2, 2), rms_norm(x.narrow(0, 2, 2), w[1])));
}

TEST(RmsNorm, AgreesAtEveryScale) {
  for (const double scale : {1e-4, 1e-2, 1e4}) {
    SCOPED_TRACE(scale);
    testing::expect_agreement(with_weight, with_weight_reference,
                              {testing::random({65, 40}) * scale, testing::random({40})});
  }
  testing::expect_agreement(with_weight, with_weight_reference,
                            {testing::random({65, 40}) + 100, testing::random({40})});
  testing::expect_agreement(with_weight, with_weight_reference,
                            {at::full({3, 40}, 0.1f, testing::device()), testing::random({40})});
}

TEST(RmsNorm, WeightGradientsDoNotDependOnTheNumberOfThreads) {
  const auto x = testing::random({1000, 24}), upstream = testing::random({1000, 24});
  const auto gradient = [&](int threads) {
    at::set_num_threads(threads);
    auto w = at::ones({24}, testing::device()).set_requires_grad(true);
    rms_norm(x, w).backward(upstream);
    return w.grad();
  };
  const int threads = at::get_num_threads();
  const auto alone = gradient(1);
  EXPECT_TRUE(gradient(2).equal(alone));
  at::set_num_threads(threads);
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
  testing::expect_error(
      [] { rms_norm(at::zeros({4, 3}), at::zeros({3, 3})); },
      "[rms_norm] weight: expected a number of weights that divides the 4 rows of x, got 3");
  testing::expect_error([] { rms_norm(at::zeros({2, 3}), at::zeros({3}, at::kBFloat16)); },
                        "[rms_norm] weight: expected Float, got BFloat16");
  testing::expect_error([] { rms_norm(at::zeros({2, 0}), std::nullopt); },
                        "[rms_norm] x: expected at least one feature");
  testing::expect_error([] { rms_norm(at::zeros({2}, at::kHalf), std::nullopt); },
                        "[rms_norm] x: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
