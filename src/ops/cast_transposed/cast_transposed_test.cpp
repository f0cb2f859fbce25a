#include "ops/cast_transposed/cast_transposed.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {

TEST(CastTransposed, IsTheCastInAnotherOrder) {
  for (const auto& [M, N] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 130}, {64, 64}, {72, 68}, {200, 4}, {8, 1001}}) {
    const auto x = testing::random({M, N}), y = cast_transposed(x);
    EXPECT_TRUE(at::equal(y, x.to(at::kBFloat16))) << M << " x " << N;
    EXPECT_TRUE(y.t().is_contiguous()) << M << " x " << N;
  }
}

TEST(CastTransposed, NamesWhatDoesNotFit) {
  testing::expect_error([] { cast_transposed(at::zeros({2})); }, "[cast_transposed] x:");
  testing::expect_error([] { cast_transposed(at::zeros({2, 2}, at::kBFloat16)); },
                        "[cast_transposed] x: expected Float, got BFloat16");
}

}  // namespace
}  // namespace megalodon::ops
