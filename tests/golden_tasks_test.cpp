#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>

#include "base/error.h"
#include "tasks/row.h"

// Problems and answers as the authors' generators write them: every row of every file of
// $MEGALODON_GOLDEN_DIR/self_improvement is solved again, and a change of a row is found.
namespace megalodon::golden {
namespace {
namespace fs = std::filesystem;

std::vector<fs::path> files() {
  const char* chosen = std::getenv("MEGALODON_GOLDEN_DIR");
  const fs::path folder =
      fs::path(chosen != nullptr ? chosen : MEGALODON_GOLDEN_DEFAULT) / "self_improvement";
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".jsonl") paths.push_back(entry.path());
  }
  std::ranges::sort(paths);
  EXPECT_FALSE(paths.empty()) << "no golden files in " << folder;
  return paths;
}

// What is wrong with a row; empty where it is right.
std::string faults(const std::string& line, const std::string& where) {
  std::string text;
  try {
    for (const auto& [member, expected, got] : tasks::check_row(line, where)) {
      text.append(member).append(": expected ").append(expected).append(", got ").append(got).append("; ");
    }
  } catch (const Error& error) {
    text = error.what();
  }
  return text;
}

TEST(GoldenTasks, AllFilesPass) {
  for (const auto& path : files()) {
    std::ifstream file(path);
    std::map<std::string, int> rows, failed;
    int number = 0;
    for (std::string line; std::getline(file, line);) {
      const std::string where = path.filename().string() + ":" + std::to_string(++number);
      const auto task = Json::parse(line)["task"].get<std::string>();
      const std::string found = faults(line, where);
      EXPECT_TRUE(found.empty()) << where << ": " << found;
      ++rows[task];
      failed[task] += !found.empty();
    }
    std::string summary;
    for (const auto& [task, count] : rows) {
      summary += "  " + task + " " + std::to_string(count - failed[task]) + "/" + std::to_string(count);
    }
    std::printf("%s%s\n", path.filename().c_str(), summary.c_str());
    EXPECT_FALSE(rows.empty()) << path;
  }
}

TEST(GoldenTasks, TamperedRowsAreFound) {
  for (const auto& path : files()) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
      Json row = Json::parse(line);
      for (const char* member : {"target", "prompt"}) {
        Json tampered = row;
        auto text = row[member].get<std::string>();
        char& changed = text[text.size() / 2];
        changed = changed == '1' ? '2' : '1';
        tampered[member] = text;
        EXPECT_FALSE(faults(tampered.dump(), "row").empty()) << tampered;
      }
    }
  }
}

}  // namespace
}  // namespace megalodon::golden
