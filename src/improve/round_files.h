#pragma once
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "improve/evaluation.h"
#include "improve/filters.h"
#include "improve/mixture.h"

namespace megalodon::improve {

// What the filters did to the answers of a round, and, for the report alone, how many labels were true.
struct LabelReport {
  int64_t generated = 0, kept = 0, unended = 0;
  std::vector<std::pair<std::string, int64_t>> left;  // after each filter of the chain
  double accuracy_before = 0, accuracy_after = 0;     // NaN: nothing was kept
};
Json to_json(const LabelReport& report);
LabelReport label_report_from_json(const Json& json, std::string_view where);

// The difficulties that a round trains on for the first time, and the rung that it reaches.
struct Plan {
  std::vector<tasks::Difficulty> difficulties;
  int64_t reach = 0;
};

// The files of one round: RUN/rounds/N. All but times.jsonl are functions of the configuration alone, so that
// what a killed process left is used again line by line.
class RoundFiles {
 public:
  RoundFiles(const std::filesystem::path& run, int64_t round, const tasks::Task& task);

  const std::filesystem::path& folder() const { return folder_; }

  // plan.json
  bool has_plan() const { return std::filesystem::exists(folder_ / "plan.json"); }
  Plan plan() const;
  void write_plan(const Plan& plan) const;

  // data.jsonl: what each model learns, {"model", "difficulty", "prompt", "label"[, "ended": false]}; beside
  // it labels.json.
  bool has_data() const { return std::filesystem::exists(folder_ / "labels.json"); }
  std::vector<std::vector<Example>> data(int64_t models) const;
  LabelReport labels() const;
  void write_data(const std::vector<Candidate>& candidates,
                  const std::vector<tasks::Difficulty>& difficulties, const LabelReport& report) const;

  // answers.jsonl: a line for every self-made problem.
  static std::string answer_line(const Candidate& candidate, const std::string& difficulty);
  Candidate answer(const std::string& line, std::string_view where) const;

  // times.jsonl: seconds that were spent, by phase.
  void add_time(const std::string& phase, double seconds) const;
  std::map<std::string, double> times() const;

  std::filesystem::path answers() const { return folder_ / "answers.jsonl"; }
  std::filesystem::path evaluation() const { return folder_ / "evaluation.jsonl"; }
  std::filesystem::path probe() const { return folder_ / "probe.jsonl"; }

 private:
  std::filesystem::path folder_;
  const tasks::Task& task_;
};

// The whole lines of a file, without their ends; none where there is no file.
std::vector<std::string> read_lines(const std::filesystem::path& path);

}  // namespace megalodon::improve
