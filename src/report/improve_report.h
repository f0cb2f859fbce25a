#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::report {

// What a self-improvement run writes to metrics.jsonl, one JSON object a line:
//   {"kind":"start"|"resume","step":n,"time":"...","task":"reverse","base":n,"rounds":n,"models":n,"parameters":n,
//    "model":"llama","device":"cpu","compute_type":"bfloat16"}
//   {"kind":"step","round":n,"step":n,"tokens":n,"loss":x,"learning_rate":x,"gradient_norm":x,"seconds":x}
//   {"kind":"labels","round":n,"step":n,"generated":n,"kept":n,"unended":n,"accuracy_before":x,"accuracy_after":x,
//    "filters":[{"filter":"vote","left":n}]}
//   {"kind":"evaluation","round":n,"step":n,"difficulty":"12","problems":n,"mean_accuracy":x,"accuracy":[x,..]
//    [,"training_may_have_seen_these":true]}
//   {"kind":"round","round":n,"step":n,"solved":"12","seconds":{"train":x,..}}
struct ImproveRun {
  struct Labels {
    std::int64_t generated = 0, kept = 0, unended = 0;
    double before = 0, after = 0;                            // share of true labels; NaN: none
    std::vector<std::pair<std::string, std::int64_t>> left;  // after each filter
  };
  struct Round {
    std::map<std::string, double> accuracy;  // by difficulty, the mean of the models
    std::string solved;                      // the hardest difficulty at 0.99 or better
    std::map<std::string, double> seconds;   // by phase
    bool evaluated = false;
  };
  struct Wrong {
    std::string difficulty, prompt, target, answer;
    std::int64_t model = 0, first_wrong = 0;
    bool ended = true;
  };
  std::string name, task, model, device, compute_type, started;
  std::int64_t base = 0, rounds = 0, models = 0, parameters = 0, resumes = 0, unreadable_lines = 0;
  std::vector<double> steps, losses, rates;
  std::map<std::int64_t, Labels> labels;      // by round
  std::map<std::int64_t, Round> evaluations;  // by round
  std::vector<std::string> difficulties;      // in the order of the first evaluation that has them
  std::set<std::string> inseparable;          // those whose problems training may have seen
  std::vector<Wrong> wrong;                   // of the last evaluated round
};

// Lines of other kinds are passed over, unreadable ones counted.
ImproveRun parse_improve_metrics(std::string_view text);
// Adds the wrong answers of an evaluation.jsonl; lines that are none are passed over.
void parse_wrong_answers(std::string_view text, ImproveRun& run);

std::string improve_report_html(const ImproveRun& run, std::string_view config);
// RUN/report.html, from metrics.jsonl, config.toml and the last round's evaluation.
void write_improve_report(const std::filesystem::path& run_folder);

}  // namespace megalodon::report
