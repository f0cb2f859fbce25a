#include "train/schedule.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace megalodon::train {
namespace {

TEST(Schedule, Cosine) {
  const Schedule s{.type = "cosine", .peak = 2, .steps = 110, .warmup_steps = 10, .final_fraction = 0.1};
  EXPECT_DOUBLE_EQ(s.rate(0), 0.2);
  EXPECT_DOUBLE_EQ(s.rate(9), 2);
  EXPECT_NEAR(s.rate(59), 1.1, 1e-9);  // half way
  EXPECT_NEAR(s.rate(109), 0.2, 1e-9);
}

TEST(Schedule, Linear) {
  const Schedule s{.type = "linear", .peak = 1, .steps = 100, .warmup_steps = 0, .final_fraction = 0};
  EXPECT_NEAR(s.rate(49), 0.5, 1e-9);
  EXPECT_NEAR(s.rate(99), 0, 1e-9);
}

TEST(Schedule, WarmupStableDecay) {
  const Schedule s{
      .type = "wsd", .peak = 1, .steps = 100, .warmup_steps = 10, .decay_steps = 20, .final_fraction = 0.01};
  EXPECT_DOUBLE_EQ(s.rate(4), 0.5);
  EXPECT_DOUBLE_EQ(s.rate(10), 1);
  EXPECT_DOUBLE_EQ(s.rate(79), 1);
  EXPECT_LT(s.rate(80), 1);
  EXPECT_NEAR(s.rate(99), 0.01, 1e-9);
}

TEST(Schedule, ReadsAndRefuses) {
  auto config = Config::from_text("[schedule]\ntype = \"wsd\"\nlearning_rate = 1e-3\n", "t.toml");
  const auto s = read_schedule(config, 1000);
  EXPECT_EQ(s.warmup_steps, 50);
  EXPECT_EQ(s.decay_steps, 200);
  auto unknown = Config::from_text("[schedule]\ntype = \"step\"\nlearning_rate = 1e-3\n", "t.toml");
  EXPECT_THROW(read_schedule(unknown, 1000), Error);
  auto late = Config::from_text("[schedule]\nlearning_rate = 1e-3\nwarmup_steps = 2000\n", "t.toml");
  EXPECT_THROW(read_schedule(late, 1000), Error);
}

}  // namespace
}  // namespace megalodon::train
