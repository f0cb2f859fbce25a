#include <algorithm>
#include <array>
#include <cmath>

#include "tasks/testing.h"

namespace megalodon::tasks {
namespace {

// Decimal addition of another form: aligned to the right, from the last column on.
std::string add_columns(std::string a, std::string b) {
  const std::size_t width = std::max(a.size(), b.size()) + 1;
  a.insert(0, width - a.size(), '0');
  b.insert(0, width - b.size(), '0');
  for (std::size_t i = width; i-- > 0;) {
    a[i] = static_cast<char>(a[i] + b[i] - '0');
    if (a[i] > '9') {
      a[i] = static_cast<char>(a[i] - 10);
      ++a[i - 1];
    }
  }
  return a;
}

std::string backwards(std::string text) {
  std::ranges::reverse(text);
  return text;
}

TEST(Addition, HasThreeLayouts) {
  EXPECT_EQ(solve("reverse_add", "21+43="), "640");
  EXPECT_EQ(solve("reverse_add", "999+1="), "0001");
  EXPECT_EQ(solve("forward_add", "12+34="), "46");
  EXPECT_EQ(solve("forward_add", "999+1="), "1000");
  EXPECT_EQ(solve("forward_add", "0+0="), "0");
  EXPECT_EQ(solve("forward_add_padded", "12+34="), "046");
  EXPECT_EQ(solve("forward_add_padded", "1+999="), "1000");
}

TEST(Addition, AgreesWithColumns) {
  for (const std::string name : {"reverse_add", "forward_add", "forward_add_padded"}) {
    const Task& task = find_task(name);
    for (std::uint64_t i = 0; i < 300; ++i) {
      Random random(1, Purpose::test, i);
      const Difficulty d{static_cast<std::int64_t>(1 + random.below(200)),
                         static_cast<std::int64_t>(1 + random.below(i % 2 ? 200 : 3))};
      const Problem problem = task.draw(d, random);
      const Json fields = task.fields(problem.prompt);
      const std::string a = fields["a"], b = fields["b"], padded = add_columns(a, b);
      EXPECT_EQ(static_cast<std::int64_t>(a.size()), d.first);
      EXPECT_EQ(static_cast<std::int64_t>(b.size()), d.second);
      const bool is_reversed = name == "reverse_add";
      std::string prompt = is_reversed ? backwards(a) : a;
      prompt.append("+").append(is_reversed ? backwards(b) : b).append("=");
      EXPECT_EQ(problem.prompt, prompt);
      std::string expected = is_reversed ? backwards(padded) : padded;
      if (name == "forward_add" && padded[0] == '0') expected = padded.substr(1);
      EXPECT_EQ(problem.target, expected);
    }
  }
}

TEST(Addition, NamesWhatIsWrongWithAPrompt) {
  EXPECT_ERROR(solve("forward_add", ""), "empty prompt");
  EXPECT_ERROR(solve("forward_add", "1+2"), "does not end with '='");
  EXPECT_ERROR(solve("forward_add", "12="), "no '+' in the prompt");
  EXPECT_ERROR(solve("forward_add", "+2="), "a number is missing at byte 0");
  EXPECT_ERROR(solve("forward_add", "1+="), "a number is missing at byte 2");
  EXPECT_ERROR(solve("forward_add", "1+2=="), "'=' at byte 3 is no digit");
  EXPECT_ERROR(solve("forward_add", "1+2+3="), "'+' at byte 3 is no digit");
  EXPECT_ERROR(solve("forward_add", "1+-2="), "'-' at byte 2 is no digit");
  EXPECT_ERROR(solve("forward_add", " 1+2="), "' ' at byte 0 is no digit");
  EXPECT_ERROR(solve("forward_add", "1+02="), "the number at byte 2 has a leading zero");
  EXPECT_ERROR(solve("reverse_add", "10+2="), "the number at byte 0 has a leading zero");
  EXPECT_EQ(solve("reverse_add", "01+2="), "210");
}

TEST(Addition, ReadsDifficulties) {
  const Task& task = find_task("reverse_add");
  EXPECT_EQ(task.difficulty("12"), (Difficulty{12, 12}));
  EXPECT_EQ(task.difficulty("3+200"), (Difficulty{3, 200}));
  EXPECT_EQ(task.text({3, 200}), "3+200");
  EXPECT_EQ(task.text({7, 7}), "7");
  EXPECT_EQ(task.problems({1, 1}), 81);
  EXPECT_EQ(task.problems({1, 2}), 810);
  for (const std::string text : {"", "0", "1001", "+", "3+", "+3", "3+0", "3+4+5", "03", "-3", "3x4", "a"}) {
    EXPECT_ERROR(task.difficulty(text), "1 to 1000");
  }
}

TEST(Addition, DrawsBaseLengthsUniformly) {
  const Task& task = find_task("reverse_add");
  constexpr int base = 4, draws = 16000;
  for (const double equal_share : {0.0, 0.5, 1.0}) {
    std::array<std::array<int, base>, base> counts{};
    for (std::uint64_t i = 0; i < draws; ++i) {
      Random random(2, Purpose::test, i);
      const Difficulty d = task.draw_base(base, equal_share, random);
      ++counts.at(static_cast<std::size_t>(d.first - 1)).at(static_cast<std::size_t>(d.second - 1));
    }
    for (std::size_t a = 0; a < base; ++a) {
      for (std::size_t b = 0; b < base; ++b) {
        const double share = (1 - equal_share) / 16 + (a == b ? equal_share / 4 : 0);
        EXPECT_NEAR(counts.at(a).at(b), draws * share, 5 * std::sqrt(draws * share)) << a << " " << b;
      }
    }
  }
}

TEST(Addition, GrowsByADigitARound) {
  const Task& task = find_task("forward_add");
  EXPECT_EQ(texts(task, task.base_grid(3)), (Texts{"1", "2", "3"}));
  EXPECT_EQ(texts(task, task.rung(10, 1)), Texts{"11"});
  EXPECT_EQ(texts(task, task.rung(10, 90)), Texts{"100"});
  EXPECT_EQ(task.base_weight(16), 16);
  EXPECT_ERROR(task.rung(10, 0), "for round 0 (round): use rounds from 1 to 990");
  EXPECT_ERROR(task.rung(0, 1), "no base of forward_add: 0 (base): use 1 to 1000");
  EXPECT_ERROR(task.rung(10, 991), "use rounds from 1 to");
}

TEST(Strings, CopyAndReverse) {
  EXPECT_EQ(solve("copy", "120="), "120");
  EXPECT_EQ(solve("reverse", "120="), "021");
  EXPECT_ERROR(solve("copy", "012="), "leading zero");
  EXPECT_ERROR(solve("copy", "1a2="), "'a' at byte 1 is no digit");
  EXPECT_ERROR(solve("reverse", "="), "a number is missing at byte 0");
  const Task& task = find_task("reverse");
  EXPECT_EQ(task.difficulty("12"), (Difficulty{12, 0}));
  EXPECT_EQ(task.text({12, 0}), "12");
  EXPECT_ERROR(task.difficulty("0"), "1 to 1000");
  EXPECT_EQ(task.fields("120="), Json::parse(R"({"a": "120", "b": null})"));
  EXPECT_EQ(texts(task, task.base_grid(2)), (Texts{"1", "2"}));
  EXPECT_EQ(texts(task, task.rung(10, 3)), Texts{"13"});
  EXPECT_ERROR(task.rung(1000, 1), "use rounds from 1 to");
  EXPECT_FALSE(task.has_two_operands());
}

}  // namespace
}  // namespace megalodon::tasks
