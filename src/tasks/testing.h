#pragma once
#include <gtest/gtest.h>

#include <string>

#include "base/testing.h"
#include "tasks/task.h"

// What the tests of src/tasks share.
namespace megalodon::tasks {

#define EXPECT_ERROR(statement, part) \
  EXPECT_TRUE(::megalodon::testing::contains(::megalodon::testing::request_error([&] { statement; }), part))

inline std::string solve(std::string_view task, std::string_view prompt) {
  return find_task(task).solve(prompt);
}

inline std::vector<std::string> texts(const Task& task, const std::vector<Difficulty>& difficulties) {
  std::vector<std::string> all;
  for (const Difficulty difficulty : difficulties) all.push_back(task.text(difficulty));
  return all;
}

using Texts = std::vector<std::string>;

}  // namespace megalodon::tasks
