#include "ops/column_sum/column_sum.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

TEST(ColumnSum, AgreesWithReference) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{1, 1}, {3, 7}, {128, 64}, {129, 40}, {1000, 257}, {5000, 264}, {140000, 3}}) {
      SCOPED_TRACE(at::str(at::IntArrayRef(shape), " ", type));
      const auto x = testing::random(shape, type) + 1;
      EXPECT_LE(testing::relative_error(column_sum(x), column_sum_reference(x.cpu().to(at::kDouble))), 1e-6);
    }
  }
  EXPECT_TRUE(at::equal(column_sum(testing::random({0, 5})), at::zeros({5}, testing::device())));
}

TEST(ColumnSum, HasTheSameBitsEveryTime) {
  const auto x = testing::random({3000, 72}, at::kBFloat16);
  EXPECT_TRUE(at::equal(column_sum(x), column_sum(x)));
}

TEST(ColumnSum, NamesWhatDoesNotFit) {
  testing::expect_error([] { column_sum(at::zeros({2, 3, 4})); }, "[column_sum] x:");
}

}  // namespace
}  // namespace megalodon::ops
