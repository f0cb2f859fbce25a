#include "cli/run_folder.h"

#include <chrono>
#include <ctime>

#include "base/config.h"
#include "base/error.h"
#include "base/file.h"

namespace megalodon::cli {
namespace fs = std::filesystem;

void make_run_folder(const fs::path& run) {
  std::error_code made;
  fs::create_directories(run, made);
  if (made) {
    fail_request("the run directory cannot be made: " + made.message(), run.string(),
                 "name another with --set run=DIR");
  }
}

void settle_configuration(const fs::path& run, const std::string& resolved, bool resume,
                          const std::function<bool(std::string_view)>& may_change_on_resume) {
  const auto saved = run / "config.toml";
  if (!fs::exists(saved)) return write_file_atomically(saved, resolved);
  if (!resume) {
    fail_request("the run directory holds a run", run.string(),
                 "continue it with --resume, or name another with --set run=DIR");
  }
  std::string differing;
  for (const auto& difference : config_differences(read_file(saved), resolved)) {
    if (!may_change_on_resume(difference.substr(0, difference.find(':')))) {
      differing += (differing.empty() ? "" : "; ") + difference;
    }
  }
  if (!differing.empty()) {
    fail_request("the configuration is not the run's: " + differing, saved.string(),
                 "undo the change, or start another run");
  }
  remove_unfinished_files(run);
}

std::string time_now() {
  const auto now = std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now());
  const std::time_t time = std::chrono::system_clock::to_time_t(now);
  std::tm utc{};
  gmtime_r(&time, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &utc);
  return text;
}

}  // namespace megalodon::cli
