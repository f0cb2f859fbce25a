#include "base/system.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <vector>

#include "base/signals.h"
#include "base/testing.h"

namespace megalodon {
namespace {

TEST(System, MemoryFollowsUse) {
  const std::int64_t before = resident_bytes();
  constexpr std::size_t size = 64 << 20;
  const std::vector<char> block(size, 'x');
  EXPECT_GE(resident_bytes() - before, std::int64_t{size} / 10 * 9);
  EXPECT_GE(peak_resident_bytes(), resident_bytes() / 10 * 9);
  EXPECT_GT(memory_bytes(), resident_bytes());
  EXPECT_EQ(block.back(), 'x');
}

TEST(System, NamesTheProcessor) {
  EXPECT_FALSE(processor_name().empty());
  EXPECT_GE(core_count(), 1);
}

// The wait status of a child that runs `body`, silent.
template <class F>
int status_of(F&& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(STDERR_FILENO);
    body();
    ::_exit(42);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

TEST(Signals, TheFirstSetsAFlag) {
  for (const int signal : {SIGINT, SIGTERM}) {
    const int status = status_of([&] {
      catch_interrupts();
      if (interrupted()) ::_exit(1);
      ::raise(signal);
      if (!interrupted()) ::_exit(2);
    });
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 42) << status;
  }
}

TEST(Signals, TheSecondEndsTheProcess) {
  const int status = status_of([] {
    catch_interrupts();
    ::raise(SIGINT);
    ::raise(SIGTERM);
  });
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM) << status;
}

TEST(Signals, BrokenPipesAreWriteErrors) {
  const int status = status_of([] {
    catch_interrupts();
    int ends[2];
    if (::pipe(ends) != 0) ::_exit(1);
    ::close(ends[0]);
    if (::write(ends[1], "x", 1) != -1) ::_exit(2);
  });
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 42) << status;
}

}  // namespace
}  // namespace megalodon
