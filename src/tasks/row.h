#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tasks/task.h"

// Problems as lines of jsonl: {"task": "reverse_add", "a": "12", "b": "34", "prompt": "21+43=", "target":
// "640"}.
namespace megalodon::tasks {

std::string problem_row(const Task& task, const Problem& problem);

// A member of a row that is not what follows from its task and prompt; values as JSON, cut to where they
// differ.
struct RowDifference {
  std::string member, expected, got;
};

// Solves the row's prompt again. Empty where the row is right; members that no task writes are left alone.
// Request errors name `where` (path:line) and what is malformed, the prompt included.
std::vector<RowDifference> check_row(std::string_view line, std::string_view where);

}  // namespace megalodon::tasks
