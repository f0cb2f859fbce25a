#include "improve/mixture.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "improve/learner.h"
#include "improve/testing.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::improve {
namespace {

ImproveConfig config() {
  ImproveConfig c;
  c.task = &tasks::find_task("reverse");
  c.base = 4;
  c.base_examples = 1000;
  c.base_weight = 3;
  return c;
}

std::vector<Example> examples(const std::string& name, int count) {
  std::vector<Example> all;
  for (int i = 0; i < count; ++i) all.push_back({name, std::to_string(i)});
  return all;
}

TEST(Mixture, IsTheLabelledSetAtFirst) {
  const auto c = config();
  Mixture mixture(c, 7);
  std::set<std::string> lengths;
  for (uint64_t i = 0; i < 200; ++i) {
    const auto example = mixture.draw(i);
    EXPECT_EQ(example.label, c.task->solve(example.prompt));
    EXPECT_TRUE(example.ended);
    lengths.insert(std::to_string(example.prompt.size()));
  }
  EXPECT_EQ(lengths.size(), 4u);
}

TEST(Mixture, WeighsTheNewestHalfAndTheOthersByWeight) {
  const auto c = config();
  Mixture mixture(c, 7);
  mixture.add(examples("first", 100), 1);
  mixture.add(examples("second", 100), 2);
  mixture.add(examples("newest", 100), 50);
  std::map<std::string, double> share;
  constexpr int draws = 20000;
  for (uint64_t i = 0; i < draws; ++i) {
    const auto prompt = mixture.draw(i).prompt;
    share[prompt.ends_with('=') ? "base" : prompt] += 1.0 / draws;
  }
  EXPECT_NEAR(share["newest"], 0.5, 0.02);
  EXPECT_NEAR(share["base"], 0.5 * 3 / 6, 0.02);
  EXPECT_NEAR(share["first"], 0.5 * 1 / 6, 0.02);
  EXPECT_NEAR(share["second"], 0.5 * 2 / 6, 0.02);
}

TEST(Mixture, ReadsASetWithoutReplacementAndThenAgain) {
  auto c = config();
  c.base_weight = 0;
  Mixture mixture(c, 7);
  mixture.add({}, 1);
  mixture.add(examples("only", 10), 1);
  std::vector<std::string> order;
  for (uint64_t i = 0; order.size() < 20; ++i) {
    const auto example = mixture.draw(i);
    if (example.prompt == "only") order.push_back(example.label);
  }
  const std::set<std::string> first(order.begin(), order.begin() + 10),
      second(order.begin() + 10, order.end());
  EXPECT_EQ(first.size(), 10u);
  EXPECT_EQ(second.size(), 10u);
  EXPECT_NE(std::vector<std::string>(order.begin(), order.begin() + 10),
            std::vector<std::string>(order.begin() + 10, order.end()));
}

TEST(Mixture, PassesOverEmptySets) {
  const auto c = config();
  Mixture mixture(c, 7);
  mixture.add(examples("old", 10), 1);
  mixture.add({}, 1);  // the filters dropped all
  std::map<bool, int> count;
  for (uint64_t i = 0; i < 400; ++i) ++count[mixture.draw(i).prompt == "old"];
  EXPECT_NEAR(count[true], 100, 30);  // 1 against the labelled set's 3
}

TEST(Mixture, GoesOnFromWhatWasTaken) {
  const auto c = config();
  const auto make = [&] {
    Mixture mixture(c, 7);
    mixture.add(examples("first", 30), 1);
    mixture.add(examples("newest", 30), 1);
    return mixture;
  };
  auto whole = make(), stopped = make();
  for (uint64_t i = 0; i < 50; ++i) {
    whole.draw(i);
    stopped.draw(i);
  }
  auto resumed = make();
  resumed.set_taken(stopped.taken());
  for (uint64_t i = 50; i < 150; ++i) {
    const auto a = whole.draw(i), b = resumed.draw(i);
    EXPECT_EQ(a.prompt + a.label, b.prompt + b.label);
  }
}

TEST(Batch, LearnsTheAnswerAndItsEndAlone) {
  const auto tokenizer = data::make_symbol_tokenizer({"1", "2", "="});  // ids 3, 4, 5
  const std::vector<Example> all{{"12=", "21"}, {"1=", "1", false}};
  const auto batch = padded_batch(*tokenizer, all);
  const int64_t x = ops::kIgnoredTarget;
  EXPECT_TRUE(
      at::equal(batch.tokens, at::tensor({0, 3, 4, 5, 4, 3, 0, 3, 5, 1, 1, 1}, at::kLong).view({2, 6})));
  EXPECT_TRUE(at::equal(
      batch.targets,
      at::tensor({x, x, x, int64_t{4}, int64_t{3}, int64_t{1}, x, x, int64_t{3}, x, x, x}, at::kLong)
          .view({2, 6})));
}

TEST(Batch, PacksTheSamePerModel) {
  const auto tokenizer = data::make_symbol_tokenizer({"1", "2", "="});
  const std::vector<Example> all{{"12=", "21"}, {"1=", "1", false}, {"2=", "2"}, {"2=", "22"}};
  const auto padded = padded_batch(*tokenizer, all), packed = packed_batch(*tokenizer, all, 2);
  ASSERT_TRUE(packed.sequences);
  const auto& borders = packed.sequences->borders;
  const int64_t T = packed.tokens.size(1), each = (borders.numel() - 1) / 2;
  EXPECT_EQ(packed.tokens.size(0), 2);
  EXPECT_EQ(T, 9);
  EXPECT_EQ(borders[each].item<int64_t>(), T);
  EXPECT_EQ(borders[-1].item<int64_t>(), 2 * T);
  EXPECT_LE(borders.diff().max().item<int64_t>(), packed.sequences->longest);
  const std::vector<int64_t> lengths{6, 3, 4, 5};
  int64_t learnt = 0;
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t n = lengths[static_cast<std::size_t>(i)];
    const auto border = borders[i / 2 * each + i % 2].item<int64_t>();
    const auto same = [&](const at::Tensor& a, const at::Tensor& b) {
      return at::equal(a[i].narrow(0, 0, n), b.flatten().narrow(0, border, n));
    };
    EXPECT_TRUE(same(padded.tokens, packed.tokens) && same(padded.targets, packed.targets)) << i;
    learnt += padded.targets[i].ne(ops::kIgnoredTarget).sum().item<int64_t>();
  }
  EXPECT_EQ(packed.targets.ne(ops::kIgnoredTarget).sum().item<int64_t>(), learnt);
}

TEST(Stage, RisesStaysAndFalls) {
  const Stage s{.peak = 2, .warmup = 4, .stable = 3, .decay = 4, .floor = 2};
  EXPECT_EQ(s.steps(), 13);
  EXPECT_DOUBLE_EQ(s.rate(0), 0.5);
  EXPECT_DOUBLE_EQ(s.rate(3), 2);
  EXPECT_DOUBLE_EQ(s.rate(6), 2);
  EXPECT_DOUBLE_EQ(s.rate(8), 2 * (0.01 + 0.99 * 0.5));  // half of the cosine
  EXPECT_DOUBLE_EQ(s.rate(10), 0.02);
  EXPECT_DOUBLE_EQ(s.rate(12), 0.02);
  const Stage line{.peak = 2, .stable = 2, .decay = 2, .linear = true, .final_fraction = 0};
  EXPECT_DOUBLE_EQ(line.rate(2), 1);
  EXPECT_DOUBLE_EQ(line.rate(3), 0);
}

}  // namespace
}  // namespace megalodon::improve
