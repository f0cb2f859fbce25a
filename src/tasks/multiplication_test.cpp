#include <algorithm>
#include <sstream>

#include "tasks/testing.h"

namespace megalodon::tasks {
namespace {

std::string written(unsigned __int128 value, std::size_t width) {
  std::string text;
  for (; text.size() < width; value /= 10) text += static_cast<char>('0' + static_cast<int>(value % 10));
  return text;
}

// The whole chain by 128-bit integers.
std::string chain(std::uint64_t a, std::uint64_t b) {
  const std::size_t width = std::to_string(a).size();
  const std::string digits = std::to_string(b);
  std::ostringstream text;
  unsigned __int128 running = 0, power = 1;
  for (std::size_t i = 0; i < digits.size(); ++i, power *= 10) {
    const unsigned __int128 partial = power * a * static_cast<unsigned>(digits[digits.size() - 1 - i] - '0');
    running += partial;
    text << (i > 0 ? "+" : "") << written(partial, i + width + 1);
    if (i > 0 && i + 1 < digits.size()) text << "(" << written(running, i + width + 1) << ")";
  }
  text << "=" << written(running, width + digits.size());
  return text.str();
}

TEST(Multiplication, WritesOutTheProducts) {
  EXPECT_EQ(solve("multiply_cot", "21*43="), "840+0630=8040");
  EXPECT_EQ(solve("multiply_cot", "3*6944="), "81+072(882)+0021(8841)+00021=88431");
  EXPECT_EQ(solve("multiply_cot", "0*0="), "00=00");
}

TEST(Multiplication, AgreesWithIntegers) {
  const Task& task = find_task("multiply_cot");
  for (std::uint64_t i = 0; i < 2000; ++i) {
    Random random(3, Purpose::test, i);
    const Difficulty d{static_cast<std::int64_t>(1 + random.below(18)),
                       static_cast<std::int64_t>(1 + random.below(18))};
    const Problem problem = task.draw(d, random);
    const Json fields = task.fields(problem.prompt);
    const std::string a = fields["a"], b = fields["b"];
    EXPECT_EQ(problem.target, chain(std::stoull(a), std::stoull(b))) << a << " * " << b;
    EXPECT_EQ(static_cast<std::int64_t>(problem.target.size()), task.longest_answer(d));
  }
}

TEST(Multiplication, NamesWhatIsWrong) {
  EXPECT_ERROR(solve("multiply_cot", "21+43="), "no '*'");
  EXPECT_ERROR(solve("multiply_cot", "20*43="), "leading zero");
  EXPECT_ERROR(solve("multiply_cot", std::string(101, '1') + "*1="), "more than 100 digits");
  const Task& task = find_task("multiply_cot");
  EXPECT_EQ(task.difficulty("3x5"), (Difficulty{3, 5}));
  EXPECT_EQ(task.text({3, 5}), "3x5");
  for (const std::string text : {"", "3", "x", "3x", "x5", "0x5", "3x101", "3x5x7", "3*5"}) {
    EXPECT_ERROR(task.difficulty(text), "1 to 100");
  }
}

TEST(Multiplication, ClimbsAlongTheSquare) {
  const Task& task = find_task("multiply_cot");
  EXPECT_EQ(task.base_grid(5).size(), 25u);
  EXPECT_EQ(texts(task, task.base_grid(2)), (Texts{"1x1", "1x2", "2x1", "2x2"}));
  EXPECT_EQ(texts(task, task.rung(5, 1)), (Texts{"1x6", "6x1"}));
  EXPECT_EQ(texts(task, task.rung(5, 5)), (Texts{"5x6", "6x5"}));
  EXPECT_EQ(texts(task, task.rung(5, 6)), Texts{"6x6"});
  EXPECT_EQ(texts(task, task.rung(5, 7)), (Texts{"1x7", "7x1"}));
  EXPECT_EQ(texts(task, task.rung(5, 30)), Texts{"9x9"});
  EXPECT_EQ(texts(task, task.rung(5, 40)), Texts{"10x10"});
  EXPECT_ERROR(task.rung(100, 1), "use rounds from 1 to");
  EXPECT_ERROR(task.rung(99, 101), "use rounds from 1 to");
  EXPECT_ERROR(task.rung(1, INT64_MAX), "use rounds from 1 to");
}

TEST(Multiplication, AcceleratedRoundsEndAtTheCorners) {
  const Task& task = find_task("multiply_cot");
  Texts ends;
  std::int64_t rung = 0;
  for (const std::int64_t taken : task.accelerated_rungs(5)) {
    rung += taken;
    ends.push_back(task.text(task.rung(5, rung).front()));
  }
  EXPECT_EQ(ends, (Texts{"1x6", "3x6", "5x6", "6x6", "1x7", "4x7", "6x7", "7x7", "2x8", "5x8", "7x8", "8x8",
                         "5x9", "8x9", "9x9", "6x10", "9x10", "10x10"}));
  EXPECT_TRUE(task.accelerated_rungs(4).empty());
}

}  // namespace
}  // namespace megalodon::tasks
