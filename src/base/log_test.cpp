#include "base/log.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <thread>

#include "base/testing.h"

namespace megalodon {
namespace {

using testing::contains;

TEST(ProgressText, SaysRateAndTimeLeft) {
  EXPECT_EQ(progress_text(0, 30, 120, "steps", 12, false, "loss 2.31"),
            "30/120 steps (25%), 2.5 steps/s, 36.0 s left, loss 2.31");
  EXPECT_EQ(progress_text(100, 130, 250, "steps", 12, false, ""),
            "130/250 steps (52%), 2.5 steps/s, 48.0 s left");
  EXPECT_EQ(progress_text(0, 120, 120, "steps", 80, true, ""), "120/120 steps (100%), 1.5 steps/s, 1m 20s");
  EXPECT_EQ(progress_text(0, 119'999, 120'000, "steps", 1, true, ""),
            "119999/120000 steps (99%), 120k steps/s, 1.0 s");
  EXPECT_EQ(progress_text(0, 1'000'000, 0, "tokens", 2, false, "x"), "1000000 tokens, 500k tokens/s, x");
  EXPECT_EQ(progress_text(0, 0, 10, "steps", 0, false, ""), "0/10 steps (0%)");
}

TEST(Human, Seconds) {
  EXPECT_EQ(human_seconds(0), "0 us");
  EXPECT_EQ(human_seconds(0.00025), "250 us");
  EXPECT_EQ(human_seconds(0.85), "850 ms");
  EXPECT_EQ(human_seconds(0.9999), "1.0 s");
  EXPECT_EQ(human_seconds(59.96), "1m 00s");
  EXPECT_EQ(human_seconds(185), "3m 05s");
  EXPECT_EQ(human_seconds(3599.7), "1h 00m");
  EXPECT_EQ(human_seconds(7800), "2h 10m");
  EXPECT_EQ(human_seconds(90000), "1d 01h");
  EXPECT_EQ(human_seconds(-1), "?");
  EXPECT_EQ(human_seconds(std::numeric_limits<double>::infinity()), "?");
}

TEST(Human, CountsAndBytes) {
  EXPECT_EQ(human_count(0), "0");
  EXPECT_EQ(human_count(999), "999");
  EXPECT_EQ(human_count(999.7), "1k");
  EXPECT_EQ(human_count(12'400), "12.4k");
  EXPECT_EQ(human_count(1'530'000), "1.53M");
  EXPECT_EQ(human_count(1e16), "10000T");
  EXPECT_EQ(human_bytes(1.2e9), "1.2 GB");
  EXPECT_EQ(human_bytes(5), "5 B");
  EXPECT_EQ(human_bytes(std::numeric_limits<double>::quiet_NaN()), "?");
}

TEST(Log, OneWholeLine) {
  ::testing::internal::CaptureStderr();
  log_note("a\nb");
  log_warning("c\x1b[2J");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "note: a b\nwarning: c?[2J\n");
}

TEST(Progress, PlainLineAtTheEnd) {
  ::testing::internal::CaptureStderr();
  {
    Progress progress("train", 40, "steps");
    progress.start_at(10);
    for (int i = 11; i <= 40; ++i) progress.update(i, "loss 1.5");
    log_note("n");
  }
  const std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_TRUE(text.starts_with("note: n\ntrain: 40/40 steps (100%), ")) << text;
  EXPECT_TRUE(text.ends_with(", loss 1.5\n")) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
}

// What a child process whose stderr is a terminal shows there.
template <class F>
std::string on_a_terminal(F&& body) {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  if (terminal < 0 || ::grantpt(terminal) != 0 || ::unlockpt(terminal) != 0) return {};
  const std::string name = ::ptsname(terminal);
  const int line = ::open(name.c_str(), O_RDWR | O_NOCTTY);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(line, STDERR_FILENO);
    body();
    ::_exit(0);
  }
  ::close(line);
  std::string text;
  char buffer[4096];
  for (ssize_t got; (got = ::read(terminal, buffer, sizeof buffer)) > 0;) {
    text.append(buffer, static_cast<std::size_t>(got));
  }
  ::close(terminal);
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  return text;
}

TEST(Progress, BarOnATerminal) {
  const std::string text = on_a_terminal([] {
    Progress progress("train", 4, "steps");
    progress.update(1);  // too early to redraw
    std::this_thread::sleep_for(std::chrono::milliseconds(120));
    progress.update(2, std::string(500, 'x'));
    log_note("here");
    {
      const Progress inner("check", 1, "files");
      std::this_thread::sleep_for(std::chrono::milliseconds(120));
      progress.update(3);  // covered
    }
    progress.update(4, "end");
  });
  const std::string clear = "\r\x1b[K";
  EXPECT_FALSE(contains(text, "1/4")) << text;
  EXPECT_FALSE(contains(text, "3/4")) << text;
  EXPECT_TRUE(contains(text, clear + "[==========          ] train: 2/4 steps (50%)"));
  EXPECT_FALSE(contains(text, std::string(80, 'x'))) << "cut to the width of the terminal";
  EXPECT_TRUE(contains(text, clear + "note: here\r\n" + clear + "[====="));
  EXPECT_TRUE(contains(text, clear + "check: 0/1 files (0%)"));
  EXPECT_TRUE(contains(text, clear + "[====================] train: 4/4 steps (100%)"));
  EXPECT_TRUE(text.ends_with(", end\r\n")) << text;
}

}  // namespace
}  // namespace megalodon
