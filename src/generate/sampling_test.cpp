#include "generate/sampling.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "base/error.h"

namespace megalodon::generate {
namespace {

std::map<int64_t, int> draws(const at::Tensor& logits, SamplingOptions options, int n) {
  std::map<int64_t, int> counts;
  for (int i = 0; i < n; ++i) ++counts[sample(logits, options, static_cast<uint64_t>(i))];
  return counts;
}

TEST(Sampling, GreedyTakesTheFirstOfTheLikeliest) {
  EXPECT_EQ(sample(at::tensor({0.f, 2.f, 1.f, 2.f}), {.temperature = 0}, 0), 1);
}

TEST(Sampling, FollowsTheDistribution) {
  const auto logits = at::log(at::tensor({0.1f, 0.2f, 0.7f}));
  const auto counts = draws(logits, {.seed = 3}, 20000);
  EXPECT_NEAR(counts.at(0), 2000, 200);
  EXPECT_NEAR(counts.at(1), 4000, 250);
  EXPECT_NEAR(counts.at(2), 14000, 300);
  const auto sharper = draws(logits, {.temperature = 0.5, .seed = 3}, 20000);  // squares: 1 : 4 : 49
  EXPECT_NEAR(sharper.at(2), 20000 * 49.0 / 54, 300);
}

TEST(Sampling, KeepsToTheLikeliest) {
  const auto logits = at::log(at::tensor({0.1f, 0.2f, 0.3f, 0.4f}));
  for (const auto& [token, count] : draws(logits, {.top_k = 2}, 2000)) EXPECT_GE(token, 2) << count;
  for (const auto& [token, count] : draws(logits, {.top_p = 0.65}, 2000)) EXPECT_GE(token, 2) << count;
  EXPECT_EQ(draws(logits, {.top_p = 0.75}, 2000).count(1), 1u);  // 0.4 + 0.3 is not enough
  EXPECT_EQ(draws(logits, {.top_p = 0.75}, 2000).count(0), 0u);
  EXPECT_EQ(draws(logits, {.top_p = 1e-6}, 100).size(), 1u);
}

TEST(Sampling, IsAFunctionOfSeedAndPosition) {
  const auto logits = at::zeros({1000});
  EXPECT_EQ(sample(logits, {.seed = 5}, 77), sample(logits, {.seed = 5}, 77));
  EXPECT_NE(sample(logits, {.seed = 5}, 77), sample(logits, {.seed = 5}, 78));
  EXPECT_NE(sample(logits, {.seed = 5}, 77), sample(logits, {.seed = 6}, 77));
}

TEST(Sampling, RefusesLogitsThatAreNotFinite) {
  EXPECT_THROW(sample(at::tensor({0.f, std::numeric_limits<float>::quiet_NaN()}), {}, 0), Error);
}

}  // namespace
}  // namespace megalodon::generate
