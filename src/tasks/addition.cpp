#include <algorithm>

#include "tasks/all_tasks.h"
#include "tasks/digits.h"

// Addition in three layouts: everything reversed with the sum padded by a zero, as one adds by hand; as one
// reads it; and as one reads it, padded.
namespace megalodon::tasks {
namespace {

constexpr std::int64_t kMostDigits = 1000;

class Addition final : public Task {
 public:
  enum class Layout { reversed, forward, forward_padded };
  Addition(std::string_view name, Layout layout) : name_(name), layout_(layout) {}

  std::string_view name() const override { return name_; }
  const std::vector<std::string>& symbols() const override {
    static const auto symbols = digits_and("+=");
    return symbols;
  }

  Difficulty difficulty(std::string_view text) const override {
    const auto plus = text.find('+');
    const auto a = parse_count(text.substr(0, plus));
    const auto b = plus == text.npos ? a : parse_count(text.substr(plus + 1));
    const auto in_range = [](std::int64_t digits) { return digits >= 1 && digits <= kMostDigits; };
    if (!a || !b || !in_range(*a) || !in_range(*b)) {
      fail_difficulty(name_, text,
                      "use the digits of both operands, 1 to " + std::to_string(kMostDigits) +
                          ", as 12, or as 3+12 where they differ");
    }
    return {*a, *b};
  }
  std::string text(Difficulty d) const override {
    return d.first == d.second ? std::to_string(d.first)
                               : std::to_string(d.first) + "+" + std::to_string(d.second);
  }
  double problems(Difficulty d) const override { return numbers(d.first) * numbers(d.second); }
  std::int64_t longest_answer(Difficulty d) const override { return std::max(d.first, d.second) + 1; }

  std::int64_t smallest_base() const override { return 1; }
  std::int64_t largest_base() const override { return kMostDigits; }
  Difficulty draw_base(std::int64_t base, double equal_share, Random& random) const override {
    const auto most = static_cast<std::uint64_t>(base);
    const bool equal = equal_share > 0 && random.uniform() < equal_share;
    const auto first = static_cast<std::int64_t>(1 + random.below(most));
    return {first, equal ? first : static_cast<std::int64_t>(1 + random.below(most))};
  }
  bool has_two_operands() const override { return true; }
  std::vector<Difficulty> base_grid(std::int64_t base) const override {
    std::vector<Difficulty> grid;
    for (std::int64_t digits = 1; digits <= base; ++digits) grid.push_back({digits, digits});
    return grid;
  }
  double base_weight(std::int64_t base) const override { return static_cast<double>(base); }
  std::int64_t last_round(std::int64_t base) const override { return kMostDigits - base; }
  std::vector<Difficulty> rung(std::int64_t base, std::int64_t round) const override {
    check_rung(*this, base, round);
    return {{base + round, base + round}};
  }

  Problem draw(Difficulty d, Random& random) const override {
    const std::string a = random_number(d.first, random), b = random_number(d.second, random);
    std::string prompt;
    prompt.reserve(a.size() + b.size() + 2);
    prompt.append(is_reversed() ? a : reversed(a)).push_back('+');
    prompt.append(is_reversed() ? b : reversed(b)).push_back('=');
    return {std::move(prompt), target({a, b})};
  }
  std::string solve(std::string_view prompt) const override {
    return target(parse_operands(prompt, '+', is_reversed()));
  }
  Json fields(std::string_view prompt) const override {
    const Operands operands = parse_operands(prompt, '+', is_reversed());
    return {{"a", reversed(operands.a)}, {"b", reversed(operands.b)}};
  }

 private:
  bool is_reversed() const { return layout_ == Layout::reversed; }
  std::string target(const Operands& operands) const {
    std::string result = sum(operands.a, operands.b);
    if (is_reversed()) return result;
    if (layout_ == Layout::forward && result.back() == '0') result.pop_back();
    std::ranges::reverse(result);
    return result;
  }

  std::string_view name_;
  Layout layout_;
};

}  // namespace

const Task& reverse_add() {
  static const Addition task("reverse_add", Addition::Layout::reversed);
  return task;
}

const Task& forward_add() {
  static const Addition task("forward_add", Addition::Layout::forward);
  return task;
}

const Task& forward_add_padded() {
  static const Addition task("forward_add_padded", Addition::Layout::forward_padded);
  return task;
}

}  // namespace megalodon::tasks
