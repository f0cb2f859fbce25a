#include "improve/filters.h"

#include <gtest/gtest.h>

#include "tasks/task.h"

namespace megalodon::improve {
namespace {

Reply reply(const std::string& text, bool ended = true, double log_probability = -1) {
  return {text, ended, static_cast<int64_t>(text.size()) + ended, log_probability};
}

Candidate candidate(std::vector<Reply> replies, int64_t model = 0, int64_t difficulty = 0) {
  return {model, difficulty, "1=", std::move(replies), static_cast<std::size_t>(model)};
}

std::vector<bool> kept(const std::vector<Candidate>& candidates) {
  std::vector<bool> result;
  for (const auto& c : candidates) result.push_back(c.kept);
  return result;
}

TEST(Vote, KeepsTheCommonAnswer) {
  std::vector<Candidate> c{
      candidate({reply("1"), reply("2"), reply("2"), reply("2"), reply("2")}),  // 4 of 5, the own one differs
      candidate({reply("1"), reply("1"), reply("1"), reply("2"), reply("2")}),  // 3 of 5
      candidate({reply("1"), reply("1"), reply("1"), reply("1"), reply("1")}, 3)};
  make_vote_filter(0.7)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(c[0].answer().text, "2");
  EXPECT_EQ(c[2].answer().text, "1");
}

TEST(Vote, ComparesWholeRowsAndCountsSharesExactly) {
  std::vector<Candidate> c{candidate({reply("1", true), reply("1", false), reply("1", false)}),
                           candidate({reply("1"), reply("1"), reply("1"), reply("2"), reply("3")})};
  make_vote_filter(0.6)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{true, true}));  // 2 of 3; 3 of 5 is 0.6
  EXPECT_FALSE(c[0].answer().ended);
  make_vote_filter(0.61)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{true, false}));
}

TEST(Length, DropsWhatIsShortWithinItsGroup) {
  std::vector<Candidate> c{candidate({reply("12345")}), candidate({reply("1234")}), candidate({reply("123")}),
                           candidate({reply("12")}, 0, 1), candidate({reply("1")}, 0, 1)};
  auto loose = c;
  make_length_filter(2)->apply(loose);
  EXPECT_EQ(kept(loose), (std::vector<bool>{true, true, false, true, true}));
  make_length_filter(1)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{true, false, false, true, false}));
}

TEST(Length, MeasuresWhatIsLeft) {
  std::vector<Candidate> c{candidate({reply("12345")}), candidate({reply("123")})};
  c[0].kept = false;  // by an earlier filter
  make_length_filter(1)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{false, true}));
}

TEST(Confidence, KeepsTheSurestShareOfEachGroup) {
  std::vector<Candidate> c;
  for (const double surety : {-3.0, -1.0, -2.0, -0.5}) c.push_back(candidate({reply("1", true, surety)}));
  for (const double surety : {-9.0, -8.0}) c.push_back(candidate({reply("1", true, surety)}, 0, 1));
  make_confidence_filter(0.5)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{false, true, false, true, false, true}));
}

TEST(Verifier, NeedsNoAnswerKey) {
  const auto& maze = tasks::find_task("maze");
  const auto problem = tasks::training_problem(maze, maze.difficulty("3/8"), 1, 0);
  std::vector<Candidate> c{candidate({reply(problem.target)}), candidate({reply("1>2")})};
  for (auto& one : c) one.prompt = problem.prompt;
  make_verifier_filter(maze, true, true)->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{true, false}));
}

TEST(Filters, ChainInOrder) {
  ImproveConfig config;
  config.filters = {"vote", "length"};
  config.vote_share = 0.6;
  config.length_slack = 1;
  const auto chain = make_filters(config);
  ASSERT_EQ(chain.size(), 2u);
  EXPECT_EQ(chain[0]->name(), "vote");
  std::vector<Candidate> c{candidate({reply("12345"), reply("123"), reply("123")}),
                           candidate({reply("123"), reply("123"), reply("12")}),
                           candidate({reply("12"), reply("12"), reply("12")})};
  for (const auto& filter : chain) filter->apply(c);
  EXPECT_EQ(kept(c), (std::vector<bool>{true, true, false}));  // the longest is that of the votes
}

}  // namespace
}  // namespace megalodon::improve
