#include "ops/product_swiglu/product_swiglu.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/joined.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

struct Sizes {
  int64_t M, K, F;
};
// Ragged rows, depths whose weight stays in a block and longer ones, features that end within a tile, several
// tiles for each block: in bfloat16 a Hopper GPU has kernels for these.
constexpr Sizes kSizes[] = {{1, 64, 64},      {63, 64, 128},    {64, 128, 64},    {65, 384, 192},
                            {1000, 320, 448}, {3000, 64, 1536}, {1, 448, 64},     {63, 2048, 64},
                            {64, 448, 128},   {65, 2048, 320},  {1000, 512, 448}, {129, 1024, 576},
                            {1500, 448, 1536}};
// And none for these, nor in float32.
constexpr Sizes kOtherSizes[] = {{17, 72, 64}, {17, 64, 40}};

at::Tensor weight_of(int64_t rows, int64_t columns, int64_t depth, at::ScalarType type) {
  return testing::random({rows, columns}, type) / std::sqrt(static_cast<double>(depth));
}
at::Tensor wide(const at::Tensor& x) {
  return x.cpu().to(at::kDouble);
}
double tolerance(at::ScalarType type) {
  return type == at::kFloat ? 2e-6 : 1.5e-2;
}

void expect_agreement(const Sizes& sizes, at::ScalarType type) {
  const auto& [M, K, F] = sizes;
  SCOPED_TRACE(at::str(M, " x ", K, " x ", F, " ", type));
  const auto x = testing::random({M, K}, type), weight = weight_of(2 * F, K, K, type);
  SwigluProduct got, alone;
  {
    const testing::PoisonedMemory poisoned;
    got = product_swiglu(x, weight);
    alone = product_swiglu(x, weight, false);
  }
  const auto want = product_swiglu_reference(wide(x), wide(weight));
  EXPECT_LE(testing::relative_error(got.a, want.a), tolerance(type));
  EXPECT_LE(testing::relative_error(got.b, want.b), tolerance(type));
  EXPECT_LE(testing::relative_error(got.y, want.y), tolerance(type));
  EXPECT_TRUE(joined({got.a, got.b}, 1).is_contiguous());
  EXPECT_TRUE(at::equal(got.y, swiglu(got.a, got.b)));
  EXPECT_TRUE(at::equal(got.y, alone.y));
  const auto again = product_swiglu(x, weight);
  EXPECT_TRUE(at::equal(got.a, again.a) && at::equal(got.b, again.b) && at::equal(got.y, again.y));
}

TEST(ProductSwiglu, AgreesWithReference) {
  for (const auto& sizes : kSizes) expect_agreement(sizes, at::kBFloat16);
}

TEST(ProductSwiglu, AgreesWithReferenceElsewhere) {
  for (const auto& sizes : kSizes) expect_agreement(sizes, at::kFloat);
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const auto& sizes : kOtherSizes) expect_agreement(sizes, type);
}

void expect_gradients(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& a,
                      const std::optional<at::Tensor>& b, bool biased, bool value) {
  SCOPED_TRACE(at::str("with b: ", b.has_value(), ", biased: ", biased, ", value: ", value));
  const auto run = [&] {
    const testing::PoisonedMemory poisoned;
    return product_swiglu_gradients(dy, weight, a, b, biased, value);
  };
  const auto got = run(), again = run();
  const auto want = product_swiglu_gradients_reference(wide(dy), wide(weight), wide(a),
                                                       b ? std::optional(wide(*b)) : std::nullopt, biased);
  const auto compare = [&](const char* name, const at::Tensor& x, const at::Tensor& same,
                           const at::Tensor& wanted) {
    EXPECT_LE(testing::relative_error(x, wanted), tolerance(dy.scalar_type())) << name;
    EXPECT_EQ(x.sizes(), wanted.sizes()) << name;
    EXPECT_TRUE(at::equal(x, same)) << name;
  };
  compare("da", got.da, again.da, want.da);
  ASSERT_EQ(got.db.defined(), b.has_value());
  if (b) compare("db", got.db, again.db, want.db);
  ASSERT_EQ(got.y.defined(), value);
  if (value) {
    compare("y", got.y, again.y, want.y);
    EXPECT_TRUE(at::equal(got.y, swiglu(a, b)));
  }
  ASSERT_EQ(got.d_bias.defined(), biased);
  if (biased) {
    EXPECT_EQ(got.d_bias.scalar_type(), at::kFloat);
    compare("d_bias", got.d_bias, again.d_bias, want.d_bias);
  }
}

void expect_gradients(const Sizes& sizes, at::ScalarType type) {
  const auto& [M, K, F] = sizes;
  SCOPED_TRACE(at::str(M, " x ", K, " x ", F, " ", type));
  const auto dy = testing::random({M, K}, type), weight = weight_of(K, F, K, type),
             both = testing::random({M, 2 * F}, type);
  const auto halves = both.chunk(2, 1);
  const auto a = halves[0].clone(), b = halves[1].clone();
  expect_gradients(dy, weight, halves[0], halves[1], false, false);
  expect_gradients(dy, weight, a, b, true, true);
  if (M > 500 || type == at::kFloat) return;
  expect_gradients(dy, weight, halves[0], halves[1], true, true);
  expect_gradients(dy, weight, a, b, false, true);
  expect_gradients(dy, weight, halves[0], b, false, true);
  expect_gradients(dy, weight, a, {}, false, true);
  expect_gradients(dy, weight, halves[1], {}, true, false);
}

TEST(ProductSwiglu, GradientsAgreeWithReference) {
  for (const auto& sizes : kSizes) expect_gradients(sizes, at::kBFloat16);
}

TEST(ProductSwiglu, GradientsAgreeWithReferenceElsewhere) {
  for (const auto& sizes : kSizes) expect_gradients(sizes, at::kFloat);
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const auto& sizes : kOtherSizes) expect_gradients(sizes, type);
}

TEST(ProductSwiglu, GradientsLieAsWhatTheyAreOf) {
  for (const int64_t M : {1, 200}) {
    const auto dy = testing::random({M, 128}, at::kBFloat16),
               weight = weight_of(128, 192, 128, at::kBFloat16),
               both = testing::random({M, 384}, at::kBFloat16);
    const auto halves = both.chunk(2, 1);
    const auto got = product_swiglu_gradients(dy, weight, halves[0], halves[1]);
    EXPECT_EQ(joined({got.da, got.db}, 1).defined(), both.is_cuda());
    const auto apart = product_swiglu_gradients(dy, weight, halves[0].clone(), halves[1].clone());
    EXPECT_FALSE(joined({apart.da, apart.db}, 1).defined());
    EXPECT_TRUE(at::equal(apart.da, got.da) && at::equal(apart.db, got.db));
  }
}

// Rows that begin somewhere in memory, and stacks.
TEST(ProductSwiglu, TakesOperandsAnywhere) {
  constexpr auto type = at::kBFloat16;
  const auto x = testing::random({9, 65}, type).narrow(1, 1, 64), weight = weight_of(129, 64, 64, type);
  const auto want = product_swiglu_reference(wide(x), wide(weight.narrow(0, 1, 128)));
  EXPECT_LE(testing::relative_error(product_swiglu(x, weight.narrow(0, 1, 128)).y, want.y), tolerance(type));
  const auto a = testing::random({9, 131}, type);
  expect_gradients(x, weight.narrow(0, 1, 64), a.narrow(1, 1, 64), a.narrow(1, 66, 64), true, true);
  expect_gradients(testing::random({2, 5, 64}, type), testing::random({2, 64, 128}, type),
                   testing::random({2, 5, 128}, type), testing::random({2, 5, 128}, type), true, true);
}

// By the kernel, ragged; of fewer rows, longer ones, and columns that it does not take.
TEST(ProductSwiglu, TallProductsAgreeWithProducts) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [M, K, N] : {Sizes{8192, 64, 128},
                                  {8257, 384, 1152},
                                  {9000, 192, 640},
                                  {100, 384, 384},
                                  {8200, 448, 128},
                                  {8200, 64, 96}}) {
      SCOPED_TRACE(at::str(M, " x ", K, " x ", N, " ", type));
      const auto x = testing::random({M, K}, type), weight = weight_of(N, K, K, type);
      const auto run = [&] {
        const testing::PoisonedMemory poisoned;
        return tall_product(x, weight);
      };
      const auto got = run();
      EXPECT_LE(testing::relative_error(got, at::matmul(wide(x), wide(weight).t())), tolerance(type));
      EXPECT_TRUE(at::equal(got, run()));
    }
  }
}

TEST(ProductSwiglu, NamesWhatDoesNotFit) {
  const auto x = at::zeros({3, 4}), weight = at::zeros({4, 6}), a = at::zeros({3, 6});
  testing::expect_error([&] { product_swiglu(x, at::zeros({6, 3})); },
                        "[product_swiglu] weight: expected shape [any, 4], got [6, 3]");
  testing::expect_error([&] { product_swiglu(x, at::zeros({5, 4})); },
                        "[product_swiglu] weight: expected an even number of rows, got 5");
  testing::expect_error([&] { product_swiglu_gradients(x, at::zeros({3, 6}), a, {}); },
                        "[product_swiglu_gradients] weight: expected shape [4, any], got [3, 6]");
  testing::expect_error([&] { product_swiglu_gradients(x, weight, at::zeros({3, 5}), {}); },
                        "[product_swiglu_gradients] a: expected shape [3, 6], got [3, 5]");
  testing::expect_error([&] { product_swiglu_gradients(x, weight, a, at::zeros({2, 6})); },
                        "[product_swiglu_gradients] b: expected shape [3, 6], got [2, 6]");
  testing::expect_error([&] { product_swiglu_gradients(x, weight, a.to(at::kDouble), {}); },
                        "[product_swiglu_gradients] a: expected Float, got Double");
}

}  // namespace
}  // namespace megalodon::ops
