#include "tasks/task.h"

#include "base/error.h"
#include "base/hash.h"
#include "tasks/all_tasks.h"

namespace megalodon::tasks {
namespace {

const std::vector<const Task*>& all_tasks() {
  static const std::vector<const Task*> tasks{&reverse_add(), &forward_add(), &forward_add_padded(),
                                              &copy(),        &reverse(),     &multiply_cot(),
                                              &maze(),        &maze_nodes()};
  return tasks;
}

// Problems for different uses share no random numbers, and neither do those of different difficulties.
enum class Use : std::uint64_t { base = 1, training, evaluation };

Random stream(Use use, Difficulty d, std::uint64_t seed, std::uint64_t index) {
  const auto shape = static_cast<std::uint64_t>(d.first) << 32 | static_cast<std::uint64_t>(d.second);
  const auto words = philox(seed, shape, static_cast<std::uint64_t>(use));
  return Random(words[0] | std::uint64_t{words[1]} << 32, Purpose::tasks, index);
}

// Whether a prompt belongs to the sixteenth that is kept for evaluation.
bool is_kept(std::string_view prompt) {
  return xxh3(prompt) % 16 == 0;
}

Problem draw_for_training(const Task& task, Difficulty difficulty, Random& random) {
  for (;;) {
    Problem problem = task.draw(difficulty, random);
    if (!is_kept(problem.prompt) || !is_separable(task, difficulty)) return problem;
  }
}

}  // namespace

const Task& find_task(std::string_view name) {
  for (const Task* task : all_tasks()) {
    if (task->name() == name) return *task;
  }
  fail_request("unknown task '" + excerpt(name) + "'", "task", "use one of " + joined(task_names()));
}

std::vector<std::string_view> task_names() {
  std::vector<std::string_view> names;
  for (const Task* task : all_tasks()) names.push_back(task->name());
  return names;
}

void check_base(const Task& task, std::int64_t base) {
  if (base >= task.smallest_base() && base <= task.largest_base()) return;
  fail_request("no base of " + std::string(task.name()) + ": " + std::to_string(base), "base",
               "use " + std::to_string(task.smallest_base()) + " to " + std::to_string(task.largest_base()));
}

// Sizes jump: two operands or strings of few digits have at most 900 problems, the next have 8,100. Of 900
// the sixteenth is 56, too few to tell an accuracy of 0.99 from 0.98, and a model that never saw them lacks
// what longer problems are made of; of 8,100 it is 506.
bool is_separable(const Task& task, Difficulty difficulty) {
  return task.problems(difficulty) >= 1000;
}

Problem training_problem(const Task& task, Difficulty difficulty, std::uint64_t seed, std::uint64_t index) {
  Random random = stream(Use::training, difficulty, seed, index);
  return draw_for_training(task, difficulty, random);
}

Problem base_problem(const Task& task, std::int64_t base, double equal_share, std::uint64_t seed,
                     std::uint64_t index) {
  Random random = stream(Use::base, {}, seed, index);
  const Difficulty difficulty = task.draw_base(base, equal_share, random);
  return draw_for_training(task, difficulty, random);
}

Problem evaluation_problem(const Task& task, Difficulty difficulty, std::uint64_t seed, std::uint64_t index) {
  Random random = stream(Use::evaluation, difficulty, seed, index);
  const bool separable = is_separable(task, difficulty);
  for (;;) {
    Problem problem = task.draw(difficulty, random);
    if (!separable || is_kept(problem.prompt)) return problem;
  }
}

}  // namespace megalodon::tasks
