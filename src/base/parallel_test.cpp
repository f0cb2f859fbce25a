#include "base/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

namespace megalodon {
namespace {

using Shares = std::vector<std::pair<std::int64_t, std::int64_t>>;

Shares shares_of(std::int64_t n, std::int64_t grain) {
  Shares shares;
  std::mutex lock;
  parallel_for(n, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard guard(lock);
    shares.emplace_back(begin, end);
  });
  std::sort(shares.begin(), shares.end());
  return shares;
}

TEST(ParallelFor, SharesCoverTheRangeOnce) {
  for (const std::int64_t n : {1, 2, 3, 7, 64, 1000, 1001}) {
    for (const std::int64_t grain : {0, 1, 2, 10, 999, 5000}) {
      const Shares shares = shares_of(n, grain);
      std::int64_t at = 0;
      for (const auto& [begin, end] : shares) {
        EXPECT_EQ(begin, at);
        EXPECT_GT(end, begin);
        EXPECT_GE(end - begin, std::min(grain, n));
        at = end;
      }
      EXPECT_EQ(at, n);
      EXPECT_EQ(shares_of(n, grain), shares);
    }
  }
  EXPECT_TRUE(shares_of(0, 1).empty());
  EXPECT_TRUE(shares_of(-3, 1).empty());
}

// A file compiled without -fopenmp must not run on one thread.
TEST(ParallelFor, UsesTheWholeTeam) {
  EXPECT_GE(thread_count(), 1);
  EXPECT_EQ(shares_of(std::int64_t{10} * thread_count(), 1).size(), static_cast<std::size_t>(thread_count()));
}

TEST(ParallelFor, RethrowsAndGoesOn) {
  const auto fail = [](std::int64_t begin, std::int64_t) {
    if (begin == 0) throw std::runtime_error("share");
  };
  EXPECT_THROW(parallel_for(100, 1, fail), std::runtime_error);
  EXPECT_THROW(parallel_for(100, 100, fail), std::runtime_error);
  EXPECT_EQ(shares_of(100, 1).back().second, 100);
}

TEST(ParallelFor, NestedLoopsRunInTheirShare) {
  std::atomic<std::int64_t> sum{0};
  parallel_for(10, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      parallel_for(10, 1, [&](std::int64_t from, std::int64_t to) { sum += to - from; });
    }
  });
  EXPECT_EQ(sum, 100);
}

}  // namespace
}  // namespace megalodon
