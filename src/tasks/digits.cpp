#include "tasks/digits.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"

namespace megalodon::tasks {
namespace {

constexpr std::int64_t kDigitsAtOnce = 18;  // as many as one draw of 64 bits holds

constexpr std::uint64_t power_of_ten(std::int64_t exponent) {
  std::uint64_t power = 1;
  for (; exponent > 0; --exponent) power *= 10;
  return power;
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

// Checks that prompt[begin, end) is a number.
std::string_view number_at(std::string_view prompt, std::size_t begin, std::size_t end, bool prompt_reversed,
                           std::string_view format) {
  const std::string_view number = prompt.substr(begin, end - begin);
  if (number.empty()) fail_prompt("a number is missing at byte " + std::to_string(begin), prompt, format);
  const auto bad = std::ranges::find_if_not(number, is_digit);
  if (bad != number.end()) {
    const auto offset = static_cast<std::size_t>(bad - number.begin());
    fail_prompt("'" + one_line({&*bad, 1}) + "' at byte " + std::to_string(begin + offset) + " is no digit",
                prompt, format);
  }
  if (number.size() > 1 && (prompt_reversed ? number.back() : number.front()) == '0') {
    fail_prompt("the number at byte " + std::to_string(begin) + " has a leading zero", prompt, format);
  }
  return number;
}

// The length of the prompt without its '='.
std::size_t length_of_question(std::string_view prompt, std::string_view format) {
  if (prompt.empty()) fail_prompt("empty prompt", prompt, format);
  if (prompt.back() != '=') fail_prompt("the prompt does not end with '='", prompt, format);
  return prompt.size() - 1;
}

}  // namespace

std::string random_number(std::int64_t length, Random& random) {
  std::string digits(static_cast<std::size_t>(length), '0');
  for (std::int64_t done = 0; done < length;) {
    const std::int64_t count = std::min(kDigitsAtOnce, length - done);
    const std::uint64_t all = power_of_ten(count), smallest = done + count == length ? all / 10 : 0;
    std::uint64_t value = smallest + random.below(all - smallest);
    for (const std::int64_t end = done + count; done < end; ++done) {
      digits[static_cast<std::size_t>(done)] = static_cast<char>('0' + value % 10);
      value /= 10;
    }
  }
  return digits;
}

std::string reversed(std::string_view digits) {
  return {digits.rbegin(), digits.rend()};
}

std::string sum(std::string_view a, std::string_view b) {
  if (a.size() < b.size()) std::swap(a, b);
  std::string digits(a.size() + 1, '0');
  int carry = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const int digit = a[i] - '0' + (i < b.size() ? b[i] - '0' : 0) + carry;
    carry = digit >= 10;
    digits[i] = static_cast<char>('0' + digit - 10 * carry);
  }
  digits.back() = static_cast<char>('0' + carry);
  return digits;
}

double numbers(std::int64_t length) {
  return std::min(1e150, 9 * std::pow(10.0, static_cast<double>(length - 1)));
}

Operands parse_operands(std::string_view prompt, char sign, bool prompt_reversed) {
  const std::string format = std::string("write two numbers ") +
                             (prompt_reversed ? "with the last digit first" : "of decimal digits") +
                             ", as 21" + sign + "43=";
  const std::size_t end = length_of_question(prompt, format), middle = prompt.find(sign);
  if (middle == prompt.npos) fail_prompt(std::string("no '") + sign + "' in the prompt", prompt, format);
  const auto a = number_at(prompt, 0, middle, prompt_reversed, format);
  const auto b = number_at(prompt, middle + 1, end, prompt_reversed, format);
  if (prompt_reversed) return {std::string(a), std::string(b)};
  return {reversed(a), reversed(b)};
}

std::string parse_number(std::string_view prompt) {
  constexpr std::string_view format = "write decimal digits, the first not zero, as 123=";
  return std::string(number_at(prompt, 0, length_of_question(prompt, format), false, format));
}

std::optional<std::int64_t> parse_count(std::string_view text) {
  if (text.empty() || text.size() > 9 || !std::ranges::all_of(text, is_digit)) return {};
  if (text.size() > 1 && text.front() == '0') return {};
  std::int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

std::vector<std::string> digits_and(std::string_view signs) {
  std::vector<std::string> symbols;
  for (const std::string_view part : {std::string_view("0123456789"), signs}) {
    for (const char c : part) symbols.emplace_back(1, c);
  }
  return symbols;
}

void fail_difficulty(std::string_view task, std::string_view text, std::string_view range) {
  fail_request("no difficulty of " + std::string(task) + ": '" + excerpt(text) + "'", "difficulty", range);
}

void fail_prompt(std::string_view what, std::string_view prompt, std::string_view format) {
  fail_request(what, "prompt \"" + excerpt(prompt) + "\"", format);
}

void check_rung(const Task& task, std::int64_t base, std::int64_t round) {
  check_base(task, base);
  if (round >= 1 && round <= task.last_round(base)) return;
  fail_request("no problems of " + std::string(task.name()) + " for round " + std::to_string(round), "round",
               "use rounds from 1 to " + std::to_string(task.last_round(base)) +
                   ", where the hardest problems are reached");
}

}  // namespace megalodon::tasks
