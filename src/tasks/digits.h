#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "tasks/task.h"

// Numbers of any length as strings of decimal digits. "Reversed": least significant digit first.
namespace megalodon::tasks {

// Uniform among the numbers of `length` >= 1 digits, the most significant not zero; reversed.
std::string random_number(std::int64_t length, Random& random);

std::string reversed(std::string_view digits);

// The sum of two reversed numbers, reversed, padded with zeros to one digit more than the longer.
std::string sum(std::string_view a, std::string_view b);

// How many numbers of `length` digits there are; 1e150 where there are more, so that products stay finite.
double numbers(std::int64_t length);

// The operands of a prompt such as "12+34=", reversed.
struct Operands {
  std::string a, b;
};
// `prompt_reversed`: the prompt writes them reversed. Each is a single zero or has no leading zero; request
// errors say what is wrong.
Operands parse_operands(std::string_view prompt, char sign, bool prompt_reversed);
// The same for "12=": the digits as they stand.
std::string parse_number(std::string_view prompt);

// A whole number of at most 9 digits without sign or leading zero, or none.
std::optional<std::int64_t> parse_count(std::string_view text);

// The ten digits, then `signs`.
std::vector<std::string> digits_and(std::string_view signs);

// A request error for a difficulty that is no difficulty of the task; `range` says what is one.
[[noreturn]] void fail_difficulty(std::string_view task, std::string_view text, std::string_view range);
// A request error for what cannot be a prompt; `format` says what can.
[[noreturn]] void fail_prompt(std::string_view what, std::string_view prompt, std::string_view format);
// A request error unless the task has a base and a round of these numbers.
void check_rung(const Task& task, std::int64_t base, std::int64_t round);

}  // namespace megalodon::tasks
