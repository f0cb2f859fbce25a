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
      // The second is wider, in a longer ring, and a piece of rows that are wider still; the third is the
      // first positions of more.
      const std::vector<at::Tensor> values{
          testing::random({c.B, c.L, c.H, c.d}, type),
          testing::random({c.B, c.L, c.H + 3, c.d}, type).narrow(2, 1, c.H + 1),
          testing::random({c.B, c.L + 2, c.H, c.d}, type).narrow(1, 0, c.L)};
      std::vector<at::Tensor> caches, want;
      for (const auto& x : values) {
        caches.push_back(testing::random({c.B, c.C + x.size(2) - c.H, x.size(2), c.d}, type));
        want.push_back(caches.back().clone());
        for (int64_t b = 0; b < c.B; ++b) {
          for (int64_t t = 0; t < c.L; ++t)
            want.back()[b][(c.start[static_cast<std::size_t>(b)] + t) % caches.back().size(1)] = x[b][t];
        }
      }
      cache_store(caches, values, at::tensor(c.start, at::kLong).to(testing::device()));
      for (std::size_t i = 0; i < caches.size(); ++i) EXPECT_TRUE(at::equal(caches[i], want[i])) << i;
    }
  }
}

TEST(CacheStore, NamesWhatDoesNotFit) {
  const auto start = at::zeros({2}, at::kLong);
  testing::expect_error([&] { cache_store({at::zeros({2, 4, 1, 3})}, {at::zeros({2, 1, 1, 2})}, start); },
                        "[cache_store] cache: expected shape [2, any, 1, 2], got [2, 4, 1, 3]");
  testing::expect_error(
      [&] { cache_store({at::zeros({2, 4, 2, 3}).transpose(1, 2)}, {at::zeros({2, 1, 4, 3})}, start); },
      "[cache_store] cache: expected a contiguous tensor");
}

}  // namespace
}  // namespace megalodon::ops
