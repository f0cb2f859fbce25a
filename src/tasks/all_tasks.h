#pragma once
#include "tasks/task.h"

// The tasks that find_task knows, each in the file of its name.
namespace megalodon::tasks {

const Task& reverse_add();  // addition.cpp
const Task& forward_add();
const Task& forward_add_padded();
const Task& copy();  // strings.cpp
const Task& reverse();
const Task& multiply_cot();  // multiplication.cpp
const Task& maze();          // maze.cpp
const Task& maze_nodes();

}  // namespace megalodon::tasks
