#include "base/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace megalodon {
namespace {

using Words = std::array<std::uint32_t, 4>;

// The known answers that the authors of Philox publish with Random123 (kat_vectors, philox4x32 10).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(~0ull, ~0ull, ~0ull), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, StreamsReplayAndDiffer) {
  const auto first_words = [](std::uint64_t seed, Purpose purpose, std::uint64_t step) {
    Random random(seed, purpose, step);
    std::vector<std::uint32_t> words(9);
    for (auto& word : words) word = random.next();
    return words;
  };
  const auto words = first_words(1, Purpose::dropout, 5);
  EXPECT_EQ(first_words(1, Purpose::dropout, 5), words);
  std::set<std::vector<std::uint32_t>> streams{words};
  EXPECT_TRUE(streams.insert(first_words(2, Purpose::dropout, 5)).second);
  EXPECT_TRUE(streams.insert(first_words(1, Purpose::sampling, 5)).second);
  EXPECT_TRUE(streams.insert(first_words(1, Purpose::dropout, 6)).second);
  EXPECT_TRUE(streams.insert(first_words(1, Purpose::dropout, 5ull << 32)).second);
  EXPECT_TRUE(streams.insert(first_words(1ull << 32, Purpose::dropout, 5)).second);
}

// Bounds of five standard errors of the mean, with a fixed seed.
TEST(Random, UniformAndNormalMoments) {
  constexpr int n = 100'000;
  Random random(3, Purpose::test, 0);
  double sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) {
    const double u = random.uniform();
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / n, 0.5, 5 * std::sqrt(1.0 / 12 / n));
  sum = 0;
  double fourth = 0;
  for (int i = 0; i < n; ++i) {
    const double x = random.normal();
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth / n, 3, 5 * std::sqrt(96.0 / n));
}

TEST(Random, BelowIsUniform) {
  Random random(4, Purpose::test, 0);
  constexpr int n = 70'000;
  std::array<int, 7> counts{};
  for (int i = 0; i < n; ++i) ++counts.at(random.below(counts.size()));
  for (const int count : counts) EXPECT_NEAR(count, n / 7.0, 5 * std::sqrt(n / 7.0));
  for (int i = 0; i < 100; ++i) EXPECT_EQ(random.below(1), 0u);
  // Just above half of all words, nearly every second one must be drawn again; the rest stay uniform.
  constexpr std::uint64_t large = (1ull << 63) + 1;
  int lower = 0;
  for (int i = 0; i < 10'000; ++i) {
    const std::uint64_t value = random.below(large);
    ASSERT_LT(value, large);
    lower += value < large / 2;
  }
  EXPECT_NEAR(lower, 5000, 5 * 50);
}

}  // namespace
}  // namespace megalodon
