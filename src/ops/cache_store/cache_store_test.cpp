#include "ops/cache_store/cache_store.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {

TEST(CacheStore, PutsEveryPositionAtItsSlot) {
  struct Case {
    int64_t B, L, C, H, d;
    std::vector<int64_t> start;
  };
  for (const auto& c : {Case{1, 1, 1, 1, 1, {0}}, Case{3, 1, 7, 2, 8, {0, 6, 7}}, Case{2, 5, 4, 1, 3, {0, 9}},
                        Case{2, 9, 16, 3, 64, {3, (int64_t{1} << 40) + 12}}}) {
    for (const auto type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      SCOPED_TRACE(at::str(c.B, " x ", c.L, " into ", c.C, " ", type));
      const auto values = testing::random({c.B, c.L, c.H, c.d}, type);
      const auto cache = testing::random({c.B, c.C, c.H, c.d}, type);
      auto want = cache.clone();
      for (int64_t b = 0; b < c.B; ++b) {
        for (int64_t t = 0; t < c.L; ++t)
          want[b][(c.start[static_cast<std::size_t>(b)] + t) % c.C] = values[b][t];
      }
      const auto start = at::tensor(c.start, at::kLong).to(testing::device());
      cache_store(cache, values, start);
      EXPECT_TRUE(at::equal(cache, want));
    }
  }
}

TEST(CacheStore, NamesWhatDoesNotFit) {
  const auto start = at::zeros({2}, at::kLong);
  testing::expect_error([&] { cache_store(at::zeros({2, 4, 1, 3}), at::zeros({2, 1, 1, 2}), start); },
                        "[cache_store] cache: expected shape [2, any, 1, 2], got [2, 4, 1, 3]");
  testing::expect_error(
      [&] { cache_store(at::zeros({2, 4, 2, 3}).transpose(1, 2), at::zeros({2, 1, 4, 3}), start); },
      "[cache_store] cache: expected a contiguous tensor");
}

}  // namespace
}  // namespace megalodon::ops
