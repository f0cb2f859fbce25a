#include "ops/product.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {

constexpr double kFloat32 = 2e-6;

at::Tensor exact(const at::Tensor& a, const at::Tensor& b) {
  return at::matmul(a.to(at::kDouble), b.to(at::kDouble));
}

// Matrices as they lie in memory, or exchanged.
at::Tensor matrix(int64_t rows, int64_t columns, bool exchanged) {
  return exchanged ? testing::random({columns, rows}).t() : testing::random({rows, columns});
}

TEST(Product, OfOneDnnIsThatOfItsOperandsHoweverTheyLie) {
  if (!has_onednn_product() || !testing::device().is_cpu()) GTEST_SKIP() << "no oneDNN here";
  for (const bool first : {false, true}) {
    for (const bool second : {false, true}) {
      for (const auto& [M, K, N] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1},
                                    {3, 70, 5},
                                    {130, 33, 257},
                                    {257, 1000, 130},
                                    {15, 900, 128}}) {
        SCOPED_TRACE(::testing::Message() << M << " " << K << " " << N << " " << first << second);
        const auto a = matrix(M, K, first), b = matrix(K, N, second), bias = testing::random({N});
        const auto y = onednn_product(a, b), with_bias = onednn_product(a, b, bias);
        EXPECT_TRUE(y.is_contiguous());
        EXPECT_LE(testing::relative_error(y, exact(a, b)), kFloat32);
        EXPECT_LE(testing::relative_error(with_bias, exact(a, b) + bias), kFloat32);
      }
    }
  }
}

// On processors where products of that size are oneDNN's, these are. On a GPU cuBLASLt's algorithms are timed
// for the larger ones, which are of one kind.
TEST(Product, AgreesWithFloat64) {
  const auto cuda = testing::device().is_cuda();
  std::vector<std::array<int64_t, 3>> shapes{{700, 130, 120}};
  if (cuda) shapes.insert(shapes.end(), {{1001, 256, 528}, {1013, 256, 528}});
  for (const auto& [M, K, N] : shapes) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(M, " x ", K, " x ", N, " ", type));
      const double tolerance = type == at::kFloat ? kFloat32 : 5e-3;
      const auto a = testing::random({M, K}, type), b = testing::random({N, K}, type).t(),
                 d = testing::random({M, N}, type), bias = testing::random({N}, type);
      const auto want = exact(a, b);
      EXPECT_LE(testing::relative_error(product(a, b), want), tolerance);
      EXPECT_LE(testing::relative_error(product(d, b.t()), exact(d, b.t())), tolerance);
      EXPECT_LE(testing::relative_error(product(d.t(), a), exact(d.t(), a)), tolerance);
      EXPECT_LE(testing::relative_error(product_with_bias(a, b, bias, d),
                                        want + bias.to(at::kDouble) + d.to(at::kDouble)),
                tolerance);
      EXPECT_LE(testing::relative_error(product_with_bias(a, b, bias), want + bias.to(at::kDouble)),
                tolerance);
      EXPECT_LE(testing::relative_error(product(a, b, at::kFloat), want), cuda ? 1e-5 : tolerance);
      const auto part = testing::random({M, K + 16}, type).narrow(1, 8, K);
      EXPECT_LE(testing::relative_error(product(part, b), exact(part, b)), tolerance);

      auto sum = testing::random({M, N}, type);
      const auto before = sum.clone();
      add_product(sum, a, b);
      EXPECT_LE(testing::relative_error(sum, before.to(at::kDouble) + want), tolerance);
      auto wide = at::zeros({M, N}, sum.options().dtype(at::kFloat));
      add_product(wide, a, b);
      EXPECT_LE(testing::relative_error(wide, want), cuda ? 1e-5 : tolerance);
      put_product(sum.narrow(0, 100, 500), a.narrow(0, 0, 500), b);
      EXPECT_LE(testing::relative_error(sum.narrow(0, 100, 500), want.narrow(0, 0, 500)), tolerance);
    }
  }
}

TEST(Product, OfStacksAgreesWithFloat64) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const double tolerance = type == at::kFloat ? kFloat32 : 5e-3;
    const auto a = testing::random({3, 200, 90}, type),
               b = testing::random({3, 80, 90}, type).transpose(1, 2);
    EXPECT_LE(testing::relative_error(product(a, b), exact(a, b)), tolerance);
    auto sums = testing::random({3, 200, 80}, type);
    const auto before = sums.clone();
    add_product(sums, a, b);
    EXPECT_LE(testing::relative_error(sums, before.to(at::kDouble) + exact(a, b)), tolerance);
  }
}

TEST(LinearLayer, KeepsWhatItMakesOfConstantWeights) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(type);
    const double tolerance = type == at::kFloat ? kFloat32 : 6e-3;
    auto w = testing::random({130, 90});
    const auto bias = testing::random({130}), stack = testing::random({3, 130, 90});
    const auto expect_right = [&] {
      for (const int64_t rows : {1, 7, 300}) {
        const auto x = testing::random({rows, 90}, type);
        const auto expected = exact(x, w.to(type).t());
        const auto y = linear_layer(x, w);
        EXPECT_EQ(y.scalar_type(), type);
        EXPECT_LE(testing::relative_error(y, expected), tolerance);
        EXPECT_LE(testing::relative_error(linear_layer(x, w, bias), expected + bias.to(at::kDouble)),
                  tolerance);
        const auto xs = testing::random({3, rows, 90}, type);
        EXPECT_LE(testing::relative_error(linear_layer(xs, stack), exact(xs, stack.to(type).transpose(1, 2))),
                  tolerance);
      }
    };
    expect_right();
    {
      const ConstantWeights outer;
      const ConstantWeights inner;
      expect_right();
      expect_right();
    }
    w.mul_(-2);
    expect_right();
  }
}

TEST(Product, OfWhatIsDifferentiatedHasItsDerivative) {
  const auto a = testing::random({200, 100}).set_requires_grad(true), b = testing::random({100, 90});
  product(a, b).sum().backward();
  EXPECT_LE(testing::relative_error(a.grad(), b.sum(1).expand({200, 100})), kFloat32);
}

}  // namespace
}  // namespace megalodon::ops
