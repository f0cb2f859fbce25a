#include "base/error.h"

#include <vector>

#include "base/testing.h"

namespace megalodon {
namespace {

using testing::request_error;
using testing::work_error;

TEST(Error, IsOneLineOfItsParts) {
  EXPECT_EQ(request_error([] { fail_request("file not found", "a.txt", "check the path"); }),
            "file not found (a.txt): check the path");
  EXPECT_EQ(work_error([] { fail_work("disk full", "", "free some space"); }), "disk full: free some space");
  EXPECT_EQ(work_error([] { fail_work("stopped", "step 3", ""); }), "stopped (step 3)");
}

// Names in a file are the choice of whoever made it.
TEST(Error, NamesCannotForgeLinesOrSteerTheTerminal) {
  EXPECT_EQ(request_error([] { fail_request("no tensor 'a\r\nerror: b'", "x\x1b[31m", "\tc\x7f\x01"); }),
            "no tensor 'a  error: b' (x?[31m):  c??");
  EXPECT_EQ(one_line("é €"), "é €");
  EXPECT_EQ(one_line(std::string_view("a\0b", 3)), "a?b");
}

TEST(Error, EditDistance) {
  EXPECT_EQ(edit_distance("", ""), 0u);
  EXPECT_EQ(edit_distance("", "abc"), 3u);
  EXPECT_EQ(edit_distance("abc", ""), 3u);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3u);
  EXPECT_EQ(edit_distance("steps", "step"), 1u);
  EXPECT_EQ(edit_distance("ab", "ba"), 2u);
}

TEST(Error, NearestName) {
  const std::vector<std::string> names{"train.steps", "train.rate", "seed"};
  EXPECT_EQ(nearest_name("trian.steps", names), "train.steps");
  EXPECT_EQ(nearest_name("sed", names), "seed");
  EXPECT_EQ(nearest_name("something else", names), "");
  EXPECT_EQ(nearest_name("x", std::vector<std::string>{}), "");
  // Takes no time: names in a file may be as long as the file.
  const std::vector<std::string> hostile{std::string(5'000'000, 'x'), "seed"};
  EXPECT_EQ(nearest_name(std::string(20, 'x'), hostile), "");
  EXPECT_EQ(nearest_name("sead", hostile), "seed");
}

}  // namespace
}  // namespace megalodon
