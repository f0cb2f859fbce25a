#include "tasks/all_tasks.h"
#include "tasks/digits.h"

// Copying and reversing a string of digits.
namespace megalodon::tasks {
namespace {

constexpr std::int64_t kMostDigits = 1000;

class Strings final : public Task {
 public:
  Strings(std::string_view name, bool reverses) : name_(name), reverses_(reverses) {}

  std::string_view name() const override { return name_; }
  const std::vector<std::string>& symbols() const override {
    static const auto symbols = digits_and("=");
    return symbols;
  }

  Difficulty difficulty(std::string_view text) const override {
    const auto digits = parse_count(text);
    if (!digits || *digits < 1 || *digits > kMostDigits) {
      fail_difficulty(name_, text, "use the digits of the string, 1 to " + std::to_string(kMostDigits));
    }
    return {*digits, 0};
  }
  std::string text(Difficulty d) const override { return std::to_string(d.first); }
  double problems(Difficulty d) const override { return numbers(d.first); }
  std::int64_t longest_answer(Difficulty d) const override { return d.first; }

  std::int64_t smallest_base() const override { return 1; }
  std::int64_t largest_base() const override { return kMostDigits; }
  Difficulty draw_base(std::int64_t base, double, Random& random) const override {
    return {static_cast<std::int64_t>(1 + random.below(static_cast<std::uint64_t>(base))), 0};
  }
  std::vector<Difficulty> base_grid(std::int64_t base) const override {
    std::vector<Difficulty> grid;
    for (std::int64_t digits = 1; digits <= base; ++digits) grid.push_back({digits, 0});
    return grid;
  }
  double base_weight(std::int64_t base) const override { return static_cast<double>(base); }
  std::int64_t last_round(std::int64_t base) const override { return kMostDigits - base; }
  std::vector<Difficulty> rung(std::int64_t base, std::int64_t round) const override {
    check_rung(*this, base, round);
    return {{base + round, 0}};
  }

  Problem draw(Difficulty d, Random& random) const override {
    const std::string digits = reversed(random_number(d.first, random));
    return {digits + "=", target(digits)};
  }
  std::string solve(std::string_view prompt) const override { return target(parse_number(prompt)); }
  Json fields(std::string_view prompt) const override {
    return {{"a", parse_number(prompt)}, {"b", nullptr}};
  }

 private:
  std::string target(const std::string& digits) const { return reverses_ ? reversed(digits) : digits; }

  std::string_view name_;
  bool reverses_;
};

}  // namespace

const Task& copy() {
  static const Strings task("copy", false);
  return task;
}

const Task& reverse() {
  static const Strings task("reverse", true);
  return task;
}

}  // namespace megalodon::tasks
