#include "data/order.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "data/testing.h"

namespace megalodon::data {
namespace {

std::vector<std::uint64_t> all_of(const Permutation& permutation, std::uint64_t n) {
  std::vector<std::uint64_t> values(n);
  for (std::uint64_t i = 0; i < n; ++i) values[i] = permutation(i);
  return values;
}

TEST(Permutation, IsOneForEverySize) {
  std::vector<std::uint64_t> sizes(70);
  std::iota(sizes.begin(), sizes.end(), 1);
  for (const std::uint64_t n : {127, 128, 129, 255, 257, 1000, 4095, 4096, 4097, 7919, 65537, 100003}) {
    sizes.push_back(n);
  }
  for (const std::uint64_t n : sizes) {
    auto values = all_of(Permutation(n, 5, 9), n);
    std::ranges::sort(values);
    for (std::uint64_t i = 0; i < n; ++i) ASSERT_EQ(values[i], i) << n;
  }
}

TEST(Permutation, StaysWithinHugeSizes) {
  for (const std::uint64_t n :
       {std::uint64_t{1} << 62, (std::uint64_t{1} << 62) + 1, (std::uint64_t{1} << 40) + 3}) {
    const Permutation permutation(n, 1, 2);
    std::set<std::uint64_t> seen;
    for (std::uint64_t i = 0; i < 1000; ++i) {
      const std::uint64_t value = permutation(n - 1 - i);
      EXPECT_LT(value, n);
      EXPECT_TRUE(seen.insert(value).second);
    }
  }
}

TEST(Permutation, DependsOnKeyAndTweak) {
  const auto base = all_of(Permutation(1000, 1, 1), 1000);
  EXPECT_EQ(base, all_of(Permutation(1000, 1, 1), 1000));
  EXPECT_NE(base, all_of(Permutation(1000, 2, 1), 1000));
  EXPECT_NE(base, all_of(Permutation(1000, 1, 2), 1000));
}

// Over many tweaks each index goes everywhere: the table of (index, value) has 12 * 12 degrees of freedom,
// its chi-square a mean of 144 * 13 / 12 and a standard deviation near 18.
TEST(Permutation, LooksRandom) {
  constexpr std::uint64_t n = 13, draws = 13000;
  constexpr double expected = static_cast<double>(draws) / n;
  std::vector<double> counts(n * n);
  for (std::uint64_t tweak = 0; tweak < draws; ++tweak) {
    const Permutation permutation(n, 3, tweak);
    for (std::uint64_t i = 0; i < n; ++i) counts[i * n + permutation(i)] += 1;
  }
  double chi_square = 0;
  for (const double count : counts) chi_square += (count - expected) * (count - expected) / expected;
  EXPECT_LT(chi_square, 144 * 13.0 / 12 + 6 * 18);
}

TEST(Permutation, NeighboursAreUncorrelated) {
  constexpr std::uint64_t n = 100003;
  const auto values = all_of(Permutation(n, 11, 0), n);
  const double mean = (n - 1) / 2.0, variance = (static_cast<double>(n) * n - 1) / 12;
  double with_next = 0, with_index = 0;
  for (std::uint64_t i = 0; i + 1 < n; ++i) {
    const double value = static_cast<double>(values[i]) - mean;
    with_next += value * (static_cast<double>(values[i + 1]) - mean) / variance / n;
    with_index += value * (static_cast<double>(i) - mean) / variance / n;
  }
  EXPECT_LT(std::abs(with_next), 5 / std::sqrt(static_cast<double>(n)));
  EXPECT_LT(std::abs(with_index), 5 / std::sqrt(static_cast<double>(n)));
}

TEST(WindowOrder, AnEpochReadsEveryWindowOnce) {
  for (const auto& [tokens, context] :
       {std::pair{1000, 10}, {1009, 16}, {33, 16}, {17, 16}, {2, 1}, {64, 31}}) {
    const WindowOrder order(tokens, context, 1, 5);
    EXPECT_GE(order.windows(), 1);
    EXPECT_LT(tokens - 1 - order.windows() * context, 2 * context);
    std::set<std::int64_t> offsets;
    for (std::int64_t epoch = 0; epoch < 40; ++epoch) {
      std::vector<std::int64_t> positions;
      positions.reserve(static_cast<std::size_t>(order.windows()));
      for (std::int64_t i = 0; i < order.windows(); ++i) {
        positions.push_back(order.position(epoch * order.windows() + i, 0));
      }
      std::ranges::sort(positions);
      offsets.insert(positions.front());
      EXPECT_GE(positions.front(), 0);
      EXPECT_LT(positions.front(), context);
      EXPECT_LE(positions.back() + context + 1, tokens);
      for (std::size_t i = 1; i < positions.size(); ++i) {
        ASSERT_EQ(positions[i] - positions[i - 1], context) << tokens << " " << context;
      }
    }
    if (tokens >= 2 * context && context > 1) {
      EXPECT_GT(offsets.size(), 1u);  // window borders move
    }
  }
}

TEST(WindowOrder, EpochsDiffer) {
  const WindowOrder order(100000, 10, 1, 5);
  int same = 0;
  for (std::int64_t i = 0; i < order.windows(); ++i) {
    same += order.position(i, 0) / 10 == order.position(order.windows() + i, 0) / 10;
  }
  EXPECT_LT(same, 10);  // one is expected
}

TEST(WindowOrder, DoesNotDependOnProcessesOrHistory) {
  const WindowOrder order(12345, 7, 12, 99), other_seed(12345, 7, 12, 98);
  const auto whole = order.positions(41);
  ASSERT_EQ(whole.size(), 12u);
  EXPECT_NE(whole, other_seed.positions(41));
  EXPECT_NE(whole, order.positions(42));
  EXPECT_EQ(whole, WindowOrder(12345, 7, 12, 99).positions(41));
  for (const std::int64_t world : {1, 2, 3, 5, 12}) {
    for (std::int64_t rank = 0; rank < world; ++rank) {
      const auto share = order.positions(41, rank, world);
      for (std::size_t i = 0; i < share.size(); ++i) {
        EXPECT_EQ(share[i], whole[static_cast<std::size_t>(rank) + i * static_cast<std::size_t>(world)]);
      }
    }
  }
  // Batches of another size walk the same sequence.
  const WindowOrder single(12345, 7, 1, 99);
  for (std::int64_t i = 0; i < 12; ++i) {
    EXPECT_EQ(single.position(std::int64_t{41} * 12 + i, 0), whole[static_cast<std::size_t>(i)]);
  }
  EXPECT_DOUBLE_EQ(order.epoch(0), 0);
  EXPECT_DOUBLE_EQ(order.epoch(order.windows()), 12);
}

TEST(WindowOrder, RefusesATooSmallCorpus) {
  EXPECT_ERROR(WindowOrder(16, 16, 1, 0), "a corpus of 16 tokens for a context of 16");
}

}  // namespace
}  // namespace megalodon::data
