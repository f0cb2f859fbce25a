#include "ops/cema_coefficients/cema_coefficients.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

testing::Function with(CemaCoefficients (*f)(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                             const at::Tensor&)) {
  return [f](const Tensors& x) {
    const auto c = f(x[0], x[1], x[2], x[3]);
    return Tensors{c.p, c.q, c.eta};
  };
}

Tensors parameters(int64_t D, int64_t N, at::ScalarType type) {
  return {testing::random({D, N}, type), testing::random({D, N}, type), testing::random({D}, type) * 3,
          testing::random({D, N, 2}, type)};
}

TEST(CemaCoefficients, AgreesWithReference) {
  for (const auto& [D, N] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 16}, {5, 7}, {64, 32}, {130, 16}, {2, 40}}) {
    SCOPED_TRACE(at::str(D, " x ", N));
    testing::expect_agreement(with(&cema_coefficients), with(&cema_coefficients_reference),
                              parameters(D, N, at::kFloat));
  }
}

TEST(CemaCoefficients, GradientsMeetFiniteDifferences) {
  testing::expect_gradients(with(&cema_coefficients), parameters(3, 4, at::kDouble));
}

TEST(CemaCoefficients, NamesWhatDoesNotFit) {
  const auto x = at::zeros({3, 4});
  testing::expect_error([&] { cema_coefficients(x, x, at::zeros({4}), at::zeros({3, 4, 2})); },
                        "[cema_coefficients] theta: expected shape [3], got [4]");
  testing::expect_error([&] { cema_coefficients(x, x, at::zeros({3}), at::zeros({3, 4})); },
                        "[cema_coefficients] gamma: expected shape [3, 4, 2], got [3, 4]");
  testing::expect_error(
      [&] { cema_coefficients(x, x.to(at::kDouble), at::zeros({3}), at::zeros({3, 4, 2})); },
      "[cema_coefficients] delta: expected Float, got Double");
}

}  // namespace
}  // namespace megalodon::ops
