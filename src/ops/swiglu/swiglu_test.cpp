#include "ops/swiglu/swiglu.h"

#include <gtest/gtest.h>

#include "ops/joined.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {

TEST(Swiglu, AgreesWithReference) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{1}, {3, 5, 7}, {2, 64}, {4, 1000, 33}}) {
      const auto a = testing::random(shape, type), b = testing::random(shape, type);
      testing::expect_agreement(
          [](const auto& x) { return at::TensorList({swiglu(x[0], x[1])}).vec(); },
          [](const auto& x) { return at::TensorList({swiglu_reference(x[0], x[1])}).vec(); }, {a, b});
      testing::expect_agreement([](const auto& x) { return at::TensorList({swiglu(x[0])}).vec(); },
                                [](const auto& x) { return at::TensorList({swiglu_reference(x[0])}).vec(); },
                                {a});
    }
  }
}

// Rows that blocks share, and columns that are whole packs or not.
TEST(Swiglu, SumsTheGradientOfABias) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{1}, {3, 5, 7}, {2, 64}, {4, 1000, 33}, {1500, 4104}}) {
      SCOPED_TRACE(at::str(at::IntArrayRef(shape), " ", type));
      const auto a = testing::random(shape, type), b = testing::random(shape, type),
                 bias = testing::random({shape.back()});
      testing::expect_agreement(
          [](const auto& x) { return at::TensorList({swiglu(x[0], x[1], x[2])}).vec(); },
          [](const auto& x) { return at::TensorList({swiglu_reference(x[0], x[1], x[2])}).vec(); },
          {a, b, bias});
      testing::expect_agreement(
          [](const auto& x) { return at::TensorList({swiglu(x[0], {}, x[1])}).vec(); },
          [](const auto& x) { return at::TensorList({swiglu_reference(x[0], {}, x[1])}).vec(); }, {a, bias});
      const auto dy = testing::random(shape, type);
      const auto got = swiglu_gradients(a, b, dy, true), want = swiglu_gradients(a, b, dy);
      EXPECT_TRUE(at::equal(got.da, want.da) && at::equal(got.db, want.db) && at::equal(got.y, want.y));
      EXPECT_TRUE(at::equal(got.d_bias, swiglu_gradients(a, b, dy, true).d_bias));
      EXPECT_FALSE(want.d_bias.defined());
    }
  }
  testing::expect_error([] { swiglu(at::zeros({2, 3}), {}, at::zeros({2}).set_requires_grad(true)); },
                        "[swiglu] bias: expected shape [3], got [2]");
}

TEST(Swiglu, AgreesWithReferenceOnLargeArguments) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    testing::expect_agreement([](const auto& x) { return at::TensorList({swiglu(x[0])}).vec(); },
                              [](const auto& x) { return at::TensorList({swiglu_reference(x[0])}).vec(); },
                              {testing::random({17, 33}, type) * 200});
  }
}

TEST(Swiglu, GradientsMeetFiniteDifferences) {
  const auto a = testing::random({3, 5}, at::kDouble), b = testing::random({3, 5}, at::kDouble);
  testing::expect_gradients([](const auto& x) { return at::TensorList({swiglu(x[0], x[1])}).vec(); }, {a, b});
}

TEST(Swiglu, GradientsComeWithTheValue) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const bool gated : {true, false}) {
      const auto a = testing::random({7, 333}, type).set_requires_grad(true),
                 b = testing::random({7, 333}, type).set_requires_grad(true),
                 dy = testing::random({7, 333}, type);
      const auto factor = gated ? std::optional(b) : std::nullopt;
      const auto y = swiglu(a, factor);
      y.backward(dy);
      const auto got = swiglu_gradients(a.detach(), gated ? std::optional(b.detach()) : std::nullopt, dy);
      EXPECT_TRUE(at::equal(got.y, y));
      EXPECT_TRUE(at::equal(got.da, a.grad()));
      EXPECT_EQ(got.db.defined(), gated);
      if (gated) {
        EXPECT_TRUE(at::equal(got.db, b.grad()));
      }
    }
  }
}

// Rows that lie further apart than they are long, of whole packs or not; on a GPU so do the gradients'.
TEST(Swiglu, TakesColumnsOfOneTensor) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{2}, {3, 5, 14}, {7, 64}, {1, 3, 48}, {4, 500, 66}, {130, 3088}, {40, 5000}}) {
      SCOPED_TRACE(at::str(at::IntArrayRef(shape), " ", type));
      const auto both = testing::random(shape, type);
      const auto halves = [](const at::Tensor& x) { return x.chunk(2, -1); };
      testing::expect_agreement(
          [&](const auto& x) { return at::TensorList({swiglu(halves(x[0])[0], halves(x[0])[1])}).vec(); },
          [&](const auto& x) {
            return at::TensorList({swiglu_reference(halves(x[0])[0], halves(x[0])[1])}).vec();
          },
          {both});
      const auto a = halves(both)[0], b = halves(both)[1], dy = testing::random(a.sizes(), type);
      for (const bool biased : {false, true}) {
        const auto got = swiglu_gradients(a, b, dy, biased),
                   want = swiglu_gradients(a.clone(), b.clone(), dy, biased);
        EXPECT_TRUE(at::equal(got.da, want.da) && at::equal(got.db, want.db) && at::equal(got.y, want.y));
        EXPECT_EQ(joined({got.da, got.db}, -1).defined(), both.is_cuda());
        EXPECT_FALSE(joined({want.da, want.db}, -1).defined());
        if (biased) EXPECT_TRUE(at::equal(got.d_bias, want.d_bias));
      }
    }
  }
}

TEST(Joined, KnowsNeighbours) {
  const auto x = testing::random({4, 3, 10});
  const auto parts = x.split_with_sizes({2, 5, 3}, -1);
  EXPECT_TRUE(joined(parts, -1).is_set_to(x));
  EXPECT_TRUE(joined({parts[1], parts[2]}, 2).is_set_to(x.narrow(2, 2, 8)));
  EXPECT_TRUE(joined(x.split(1, 0), 0).is_set_to(x));
  const auto none = [](const std::vector<at::Tensor>& some) { return !joined(some, -1).defined(); };
  EXPECT_TRUE(none({parts[0], parts[2]}) && none({parts[1], parts[0]}) && none({parts[0], at::Tensor()}));
  EXPECT_TRUE(none({parts[0], parts[1].clone()}) && none({parts[0], parts[1].narrow(0, 0, 3)}));
  const auto made = empty_like_joined(parts, -1);
  EXPECT_TRUE(joined(made, -1).is_contiguous());
  EXPECT_EQ(made[1].sizes(), parts[1].sizes());
  for (const auto& alone : empty_like_joined({parts[0], parts[2]}, -1)) EXPECT_TRUE(alone.is_contiguous());
}

TEST(Swiglu, NamesWhatDoesNotFit) {
  testing::expect_error([] { swiglu(at::zeros({2, 3}), at::zeros({3, 2})); },
                        "[swiglu] b: expected shape [2, 3], got [3, 2]");
  testing::expect_error([] { swiglu(at::zeros({2}, at::kHalf)); }, "[swiglu] a: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
