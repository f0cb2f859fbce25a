#include <string>

#include "fuzz.h"
#include "tasks/row.h"

// A row to check, or a prompt of every task.
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  const auto text = fuzz::text_of(data, size);
  fuzz::takes([&] {
    for (const auto& [member, expected, got] : tasks::check_row(text, "input:1")) {
      fuzz::require(expected != got, "a difference shows");
      fuzz::require(got.size() < 100, "the length of a value");
    }
  });
  for (const auto name : tasks::task_names()) {
    const tasks::Task& task = tasks::find_task(name);
    fuzz::takes([&] {
      const tasks::Difficulty difficulty = task.difficulty(text);
      fuzz::require(task.difficulty(task.text(difficulty)) == difficulty, "difficulties come back");
    });
    fuzz::takes([&] {
      const std::string prompt(text), target = task.solve(prompt);
      fuzz::require(tasks::check_row(tasks::problem_row(task, {prompt, target}), "own:1").empty(),
                    "a solved prompt is a right row");
      fuzz::require(task.verify(prompt, target, true, true) == task.has_verifier(),
                    "a right answer is verified");
    });
  }
  return 0;
}
