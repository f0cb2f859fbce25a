#include "ops/product_rms_norm/product_rms_norm.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/add_rms_norm/add_rms_norm.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;

constexpr double kEps = 1e-5;

struct Sizes {
  int64_t M, K, D;
};
// Ragged rows, more stages than a ring has and fewer, one and several tiles of a block; last, sizes without a
// kernel.
constexpr Sizes kSizes[] = {{1, 64, 384},      {65, 384, 384},   {128, 320, 384},   {129, 64, 384},
                            {300, 1536, 384},  {2000, 384, 384}, {9000, 1152, 384}, {40000, 64, 384},
                            {17000, 192, 384}, {33, 3072, 384},  {17, 72, 384},     {17, 64, 40}};

at::Tensor weight_of(int64_t rows, int64_t columns, int64_t depth, at::ScalarType type) {
  return testing::random({rows, columns}, type) / std::sqrt(static_cast<double>(depth));
}
at::Tensor wide(const at::Tensor& x) {
  return x.cpu().to(at::kDouble);
}

// Tensor cores cut off what float32 would round: 1e-5.
void compare(const char* name, const at::Tensor& x, const at::Tensor& again, const at::Tensor& wanted,
             at::ScalarType type) {
  EXPECT_EQ(x.scalar_type(), type) << name;
  EXPECT_EQ(x.sizes(), wanted.sizes()) << name;
  EXPECT_LE(testing::relative_error(x, wanted), type == at::kFloat ? 1e-5 : 4e-3) << name;
  EXPECT_TRUE(at::equal(x, again)) << name;
}

TEST(ProductRmsNorm, AgreesWithReference) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [M, K, D] : kSizes) {
      SCOPED_TRACE(at::str(M, " x ", K, " x ", D, " ", type));
      const auto x = testing::random({M, K}, type), weight = weight_of(D, K, K, type),
                 residual = testing::random({M, D}), factor = testing::random({D});
      const auto run = [&] {
        const testing::PoisonedMemory poisoned;
        return product_rms_norm(x, weight, residual, factor, kEps);
      };
      const auto got = run(), again = run();
      const auto want = product_rms_norm_reference(wide(x), wide(weight), wide(residual), wide(factor), kEps);
      compare("sum", got.sum, again.sum, want.sum, at::kFloat);
      compare("normal", got.normal, again.normal, want.normal, type);
      compare("rstd", got.rstd, again.rstd, want.rstd, at::kFloat);
    }
  }
}

TEST(ProductRmsNorm, GradientsAgreeWithReference) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [M, K, D] : kSizes) {
      for (const bool added : {true, false}) {
        SCOPED_TRACE(at::str(M, " x ", K, " x ", D, " ", type, added ? " with d_sum" : ""));
        const auto dy = testing::random({M, K}, type), weight = weight_of(K, D, K, type),
                   sum = testing::random({M, D}), factor = testing::random({D});
        const auto rstd = at::rsqrt(sum.square().mean(-1) + kEps);
        const auto d_sum = added ? Optional(testing::random({M, D})) : std::nullopt;
        const auto run = [&] {
          const testing::PoisonedMemory poisoned;
          return product_rms_norm_gradients(dy, weight, sum, factor, rstd, d_sum);
        };
        const auto got = run(), again = run();
        const auto want =
            product_rms_norm_gradients_reference(wide(dy), wide(weight), wide(sum), wide(factor), wide(rstd),
                                                 added ? Optional(wide(*d_sum)) : std::nullopt);
        compare("dx", got.dx, again.dx, want.dx, at::kFloat);
        compare("d_added", got.d_added, again.d_added, want.d_added, type);
        compare("d_factor", got.d_factor, again.d_factor, want.d_factor, at::kFloat);
      }
    }
  }
}

// Both references are that of addition with RMS norm, and its derivative, with a product before or behind.
TEST(ProductRmsNorm, IsProductAndNorm) {
  const auto x = testing::random({5, 8}, at::kDouble).cpu(),
             weight = testing::random({6, 8}, at::kDouble).cpu(),
             residual = testing::random({5, 6}, at::kDouble).cpu().set_requires_grad(true),
             factor = testing::random({6}, at::kDouble).cpu().set_requires_grad(true);
  const auto got = product_rms_norm_reference(x, weight, residual, factor, kEps);
  const auto want = add_rms_norm_reference(residual, at::matmul(x, weight.t()), factor, kEps, at::kDouble);
  EXPECT_LE(testing::relative_error(got.sum, want.sum), 1e-14);
  EXPECT_LE(testing::relative_error(got.normal, want.normal), 1e-14);
  const auto dy = testing::random({5, 7}, at::kDouble).cpu(),
             after = testing::random({7, 6}, at::kDouble).cpu(),
             d_sum = testing::random({5, 6}, at::kDouble).cpu();
  const auto gradients = product_rms_norm_gradients_reference(dy, after, got.sum.detach(), factor.detach(),
                                                              got.rstd.detach(), d_sum);
  (at::matmul(want.normal, after.t()).mul(dy).sum() + want.sum.mul(d_sum).sum()).backward();
  EXPECT_LE(testing::relative_error(gradients.dx, residual.grad()), 1e-13);
  EXPECT_LE(testing::relative_error(gradients.d_factor, factor.grad()), 1e-13);
}

// Matrices that begin somewhere in memory.
TEST(ProductRmsNorm, TakesOperandsAnywhere) {
  constexpr auto type = at::kBFloat16;
  const auto x = testing::random({9, 65}, type).narrow(1, 1, 64),
             weight = weight_of(385, 64, 64, type).narrow(0, 1, 384),
             residual = testing::random({9 * 384 + 1}).narrow(0, 1, 9 * 384).view({9, 384}),
             factor = testing::random({385}).narrow(0, 1, 384);
  const auto got = product_rms_norm(x, weight, residual, factor, kEps);
  const auto want = product_rms_norm_reference(wide(x), wide(weight), wide(residual), wide(factor), kEps);
  compare("sum", got.sum, got.sum, want.sum, at::kFloat);
  compare("normal", got.normal, got.normal, want.normal, type);
}

TEST(ProductRmsNorm, NamesWhatDoesNotFit) {
  const auto x = at::zeros({3, 4}), weight = at::zeros({6, 4}), residual = at::zeros({3, 6}),
             factor = at::ones({6});
  testing::expect_error([&] { product_rms_norm(x, at::zeros({6, 3}), residual, factor, kEps); },
                        "[product_rms_norm] weight: expected shape [any, 4], got [6, 3]");
  testing::expect_error([&] { product_rms_norm(x, weight, at::zeros({3, 5}), factor, kEps); },
                        "[product_rms_norm] residual: expected shape [3, 6], got [3, 5]");
  testing::expect_error([&] { product_rms_norm(x, weight, residual, at::ones({5}), kEps); },
                        "[product_rms_norm] factor: expected shape [6], got [5]");
  testing::expect_error(
      [&] { product_rms_norm_gradients(x, at::zeros({4, 6}), residual, factor, at::zeros({2}), {}); },
      "[product_rms_norm_gradients] rstd: expected shape [3], got [2]");
}

}  // namespace
}  // namespace megalodon::ops
