#include <benchmark/benchmark.h>

#include "tasks/task.h"

// Problems a second, one thread.
namespace megalodon::bench {
namespace {

void base_problems(benchmark::State& state, const char* name, std::int64_t base) {
  const tasks::Task& task = tasks::find_task(name);
  std::uint64_t index = 0;
  for (auto _ : state) benchmark::DoNotOptimize(tasks::base_problem(task, base, 0, 1, index++));
  state.SetItemsProcessed(state.iterations());
}

void training_problems(benchmark::State& state, const char* name, const char* difficulty) {
  const tasks::Task& task = tasks::find_task(name);
  const tasks::Difficulty d = task.difficulty(difficulty);
  std::uint64_t index = 0;
  for (auto _ : state) benchmark::DoNotOptimize(tasks::training_problem(task, d, 1, index++));
  state.SetItemsProcessed(state.iterations());
}

BENCHMARK_CAPTURE(base_problems, reverse_add_to_16, "reverse_add", 16);
BENCHMARK_CAPTURE(base_problems, forward_add_to_10, "forward_add", 10);
BENCHMARK_CAPTURE(base_problems, reverse_to_10, "reverse", 10);
BENCHMARK_CAPTURE(base_problems, multiply_cot_to_5x5, "multiply_cot", 5);
BENCHMARK_CAPTURE(base_problems, maze_to_9_hops, "maze", 9);
BENCHMARK_CAPTURE(base_problems, maze_to_30_nodes, "maze_nodes", 30);
BENCHMARK_CAPTURE(training_problems, reverse_add_16, "reverse_add", "16");
BENCHMARK_CAPTURE(training_problems, reverse_add_100, "reverse_add", "100");
BENCHMARK_CAPTURE(training_problems, multiply_cot_10x10, "multiply_cot", "10x10");
BENCHMARK_CAPTURE(training_problems, maze_9_of_30, "maze", "9");
BENCHMARK_CAPTURE(training_problems, maze_9_of_99, "maze", "9/99");

}  // namespace
}  // namespace megalodon::bench

BENCHMARK_MAIN();
