#include "tasks/task.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/hash.h"
#include "tasks/testing.h"

namespace megalodon::tasks {
namespace {

struct Level {
  const Task* task;
  std::int64_t base;
};

std::vector<Level> levels() {
  std::vector<Level> all;
  for (const auto name : task_names()) {
    const Task& task = find_task(name);
    all.push_back({&task, std::clamp<std::int64_t>(4, task.smallest_base() + 3, task.largest_base())});
  }
  return all;
}

std::vector<Difficulty> difficulties(const Level& level) {
  auto all = level.task->base_grid(level.base);
  for (std::int64_t round = 1; round <= 3; ++round) {
    for (const Difficulty d : level.task->rung(level.base, round)) all.push_back(d);
  }
  return all;
}

bool spells(const std::vector<std::string>& symbols, std::string_view text) {
  while (!text.empty()) {
    std::size_t longest = 0;
    for (const auto& symbol : symbols) {
      if (text.starts_with(symbol)) longest = std::max(longest, symbol.size());
    }
    if (longest == 0) return false;
    text.remove_prefix(longest);
  }
  return true;
}

TEST(Tasks, AreFoundByName) {
  EXPECT_EQ(task_names(),
            (std::vector<std::string_view>{"reverse_add", "forward_add", "forward_add_padded", "copy",
                                           "reverse", "multiply_cot", "maze", "maze_nodes"}));
  for (const auto name : task_names()) EXPECT_EQ(find_task(name).name(), name);
  EXPECT_ERROR(find_task("add"), "unknown task 'add' (task): use one of reverse_add, forward_add");
}

TEST(Tasks, ProblemsKeepTheContract) {
  for (const Level& level : levels()) {
    const Task& task = *level.task;
    for (const Difficulty d : difficulties(level)) {
      SCOPED_TRACE(std::string(task.name()) + " " + task.text(d));
      EXPECT_EQ(task.difficulty(task.text(d)), d);
      for (std::uint64_t i = 0; i < 50; ++i) {
        const Problem problem = training_problem(task, d, 1, i);
        EXPECT_EQ(task.solve(problem.prompt), problem.target);
        EXPECT_TRUE(spells(task.symbols(), problem.prompt)) << problem.prompt;
        EXPECT_TRUE(spells(task.symbols(), problem.target)) << problem.target;
        const auto tokens = task.has_verifier() ? 2 * std::ranges::count(problem.target, '>') + 1
                                                : static_cast<std::ptrdiff_t>(problem.target.size());
        EXPECT_LE(tokens, task.longest_answer(d));
        EXPECT_EQ(task.verify(problem.prompt, problem.target, true, true), task.has_verifier());
      }
    }
  }
}

TEST(Tasks, TheLongestAnswerIsReached) {
  for (const std::string name : {"reverse_add", "forward_add", "copy", "multiply_cot"}) {
    const Task& task = find_task(name);
    const Difficulty d = task.base_grid(3).back();
    std::size_t longest = 0;
    for (std::uint64_t i = 0; i < 100; ++i) {
      longest = std::max(longest, training_problem(task, d, 1, i).target.size());
    }
    EXPECT_EQ(static_cast<std::int64_t>(longest), task.longest_answer(d)) << name;
  }
}

TEST(Tasks, ProblemsAreFunctionsOfSeedAndIndex) {
  for (const Level& level : levels()) {
    const Task& task = *level.task;
    const Difficulty d = task.rung(level.base, 3).back();
    std::set<std::string> prompts;
    for (std::uint64_t i = 0; i < 100; ++i) {
      const std::string prompt = training_problem(task, d, 1, i).prompt;
      EXPECT_EQ(training_problem(task, d, 1, i).prompt, prompt);
      EXPECT_EQ(base_problem(task, level.base, 0.25, 1, i).prompt,
                base_problem(task, level.base, 0.25, 1, i).prompt);
      EXPECT_EQ(evaluation_problem(task, d, 1, i).prompt, evaluation_problem(task, d, 1, i).prompt);
      prompts.insert(prompt);
      prompts.insert(training_problem(task, d, 2, i).prompt);
    }
    EXPECT_GT(prompts.size(), 195u) << task.name();
  }
}

// The digits of a difficulty are not the beginning of those of the next.
TEST(Tasks, DifficultiesShareNoNumbers) {
  const Task& task = find_task("copy");
  int equal = 0;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    equal += training_problem(task, {20, 0}, 1, i).prompt.substr(0, 3) ==
             training_problem(task, {21, 0}, 1, i).prompt.substr(0, 3);
  }
  EXPECT_LT(equal, 10);  // one of 900 by chance
}

TEST(Tasks, EvaluationIsDisjointFromTraining) {
  for (const Level& level : levels()) {
    const Task& task = *level.task;
    std::set<std::string> trained, evaluated;
    for (std::uint64_t i = 0; i < 20000; ++i)
      trained.insert(base_problem(task, level.base, 0.25, 1, i).prompt);
    for (const Difficulty d : difficulties(level)) {
      for (std::uint64_t i = 0; i < 1000; ++i) trained.insert(training_problem(task, d, 1, i).prompt);
    }
    int separable = 0;
    for (const Difficulty d : difficulties(level)) {
      if (!is_separable(task, d)) continue;
      ++separable;
      for (std::uint64_t i = 0; i < 300; ++i) evaluated.insert(evaluation_problem(task, d, 1, i).prompt);
    }
    EXPECT_GT(separable, 2) << task.name();
    for (const auto& prompt : evaluated) EXPECT_FALSE(trained.contains(prompt)) << prompt;
  }
}

// All 8,100 problems of two digits and two: the sixteenth that is kept, and only that, is evaluated.
TEST(Tasks, ASixteenthIsKept) {
  const Task& task = find_task("forward_add");
  const Difficulty d{2, 2};
  ASSERT_TRUE(is_separable(task, d));
  std::map<std::string, int> trained, evaluated;
  for (std::uint64_t i = 0; i < 100000; ++i) ++trained[training_problem(task, d, 1, i).prompt];
  for (std::uint64_t i = 0; i < 10000; ++i) ++evaluated[evaluation_problem(task, d, 1, i).prompt];
  EXPECT_EQ(trained.size() + evaluated.size(), 8100u);
  EXPECT_NEAR(static_cast<double>(evaluated.size()), 8100 / 16.0, 100);
}

TEST(Tasks, SmallDifficultiesAreNotSeparable) {
  const Task& task = find_task("forward_add");
  EXPECT_FALSE(is_separable(task, {1, 1}));
  EXPECT_FALSE(is_separable(task, {2, 1}));
  EXPECT_TRUE(is_separable(task, {1, 3}));
  EXPECT_FALSE(is_separable(find_task("copy"), {3, 0}));
  EXPECT_TRUE(is_separable(find_task("copy"), {4, 0}));
  EXPECT_TRUE(is_separable(find_task("maze"), {1, 2}));
  std::set<std::string> trained;
  for (std::uint64_t i = 0; i < 2000; ++i) trained.insert(training_problem(task, {1, 1}, 1, i).prompt);
  EXPECT_EQ(trained.size(), 81u);  // nothing is withheld
}

}  // namespace
}  // namespace megalodon::tasks
