#include "tasks/all_tasks.h"
#include "tasks/digits.h"

// Multiplication written out: partial products, running sums, the result, all reversed. 12 * 34 is
// "21*43=" -> "840+0630=8040".
namespace megalodon::tasks {
namespace {

constexpr std::int64_t kMostDigits = 100;  // the answer grows with the square

// `digits` (reversed) * `digit`, of one digit more.
std::string multiply_by_digit(std::string_view digits, char digit) {
  std::string product(digits.size() + 1, '0');
  int carry = 0;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    const int value = (digits[i] - '0') * (digit - '0') + carry;
    product[i] = static_cast<char>('0' + value % 10);
    carry = value / 10;
  }
  product.back() = static_cast<char>('0' + carry);
  return product;
}

std::string written_out(const Operands& operands) {
  const auto& [a, b] = operands;
  // Partial product i is b_i * a * 10^i; so many digits are enough for the running sum too.
  std::string text, running;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const std::string partial = std::string(i, '0') + multiply_by_digit(a, b[i]);
    running = i == 0 ? partial : sum(running, partial).substr(0, partial.size());
    if (i > 0) text += '+';
    text += partial;
    if (i > 0 && i + 1 < b.size()) text.append("(").append(running).append(")");
  }
  return text.append("=").append(running);
}

class Multiplication final : public Task {
 public:
  std::string_view name() const override { return "multiply_cot"; }
  const std::vector<std::string>& symbols() const override {
    static const auto symbols = digits_and("*=+()");
    return symbols;
  }

  Difficulty difficulty(std::string_view text) const override {
    const auto times = text.find('x');
    const auto a = parse_count(text.substr(0, times));
    const auto b = times == text.npos ? std::nullopt : parse_count(text.substr(times + 1));
    const auto in_range = [](std::int64_t digits) { return digits >= 1 && digits <= kMostDigits; };
    if (!a || !b || !in_range(*a) || !in_range(*b)) {
      fail_difficulty(name(), text,
                      "use the digits of both factors, 1 to " + std::to_string(kMostDigits) + ", as 3x5");
    }
    return {*a, *b};
  }
  std::string text(Difficulty d) const override {
    return std::to_string(d.first) + "x" + std::to_string(d.second);
  }
  double problems(Difficulty d) const override { return numbers(d.first) * numbers(d.second); }
  std::int64_t longest_answer(Difficulty d) const override {
    std::int64_t length = 1 + d.first + d.second;  // the result
    for (std::int64_t i = 0; i < d.second; ++i) {
      const std::int64_t number = i + d.first + 1;
      length += number + (i > 0) + (i > 0 && i + 1 < d.second ? number + 2 : 0);
    }
    return length;
  }

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
    for (std::int64_t a = 1; a <= base; ++a) {
      for (std::int64_t b = 1; b <= base; ++b) grid.push_back({a, b});
    }
    return grid;
  }
  double base_weight(std::int64_t base) const override { return static_cast<double>(base); }

  // The sides of a square of k x k: j x (k+1) and (k+1) x j for j = 1 .. k, then its corner.
  std::int64_t last_round(std::int64_t base) const override {
    return (kMostDigits * (kMostDigits + 1) - base * (base + 1)) / 2;
  }
  std::vector<Difficulty> rung(std::int64_t base, std::int64_t round) const override {
    check_rung(*this, base, round);
    std::int64_t side = base + 1, j = round;
    for (; j > side; ++side) j -= side;
    if (j == side) return {{side, side}};
    return {{j, side}, {side, j}};
  }
  std::vector<std::int64_t> accelerated_rungs(std::int64_t base) const override {
    if (base != 5) return {};
    return {1, 2, 2, 1, 1, 3, 2, 1, 2, 3, 2, 1, 5, 3, 1, 6, 3, 1};  // to 6x6, 7x7, 8x8, 9x9, 10x10
  }

  Problem draw(Difficulty d, Random& random) const override {
    Operands operands;
    operands.a = random_number(d.first, random);
    operands.b = random_number(d.second, random);
    return {operands.a + "*" + operands.b + "=", written_out(operands)};
  }
  std::string solve(std::string_view prompt) const override { return written_out(parse(prompt)); }
  Json fields(std::string_view prompt) const override {
    const Operands operands = parse(prompt);
    return {{"a", reversed(operands.a)}, {"b", reversed(operands.b)}};
  }

 private:
  static Operands parse(std::string_view prompt) {
    Operands operands = parse_operands(prompt, '*', true);
    if (std::max(operands.a.size(), operands.b.size()) > kMostDigits) {
      fail_prompt("a factor of more than " + std::to_string(kMostDigits) + " digits", prompt,
                  "use shorter factors: the answer grows with their square");
    }
    return operands;
  }
};

}  // namespace

const Task& multiply_cot() {
  static const Multiplication task;
  return task;
}

}  // namespace megalodon::tasks
