#pragma once
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "report/metrics.h"
#include "report/plot.h"

namespace megalodon::report {

// Reads config.toml and metrics.jsonl of a training run and writes report.html beside them. Missing or empty
// metrics are a request error; a missing config.toml leaves its section out.
void write_run_report(const std::filesystem::path& run_folder);
std::string run_report_html(const RunMetrics& run, std::string_view config);

// Runs and evaluations side by side.
struct Comparison {
  std::string title;
  std::vector<std::string> notes;              // paragraphs: the text's source and licence, the machine ...
  std::vector<std::filesystem::path> runs;     // run folders
  std::vector<std::filesystem::path> results;  // JSON lines of evaluations, see report/metrics.h
};

// Writes one page to `path`; what there is nothing for (no runs, no evaluations) is left out.
void write_comparison_report(const std::filesystem::path& path, const Comparison& comparison);
std::string comparison_html(std::string_view title, const std::vector<std::string>& notes,
                            const std::vector<RunMetrics>& runs, const Results& results);

// The curve of one quantity of a run, short enough to draw.
enum class Against { step, tokens, seconds };
Series training_curve(const RunMetrics& run, Against against, double TrainingStep::* quantity,
                      std::string name);
Series validation_curve(const RunMetrics& run, Against against, std::string name);

// The mean loss of the last training steps (a fiftieth of them, at least one); NaN where all were skipped.
double final_training_loss(const RunMetrics& run);

}  // namespace megalodon::report
