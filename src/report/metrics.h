#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::report {

// What a training run writes to metrics.jsonl, one JSON object a line:
//   {"kind":"start"|"resume","step":n,"time":"...","parameters":n,"model":"megalodon","device":"cpu",
//    "compute_type":"bfloat16"[,"data":"what it is trained on"]}
//   {"kind":"step","step":n,"tokens":n,"loss":x,"learning_rate":x,"gradient_norm":x,"seconds":x,
//    "tokens_per_second":x[,"skipped":true]}
//   {"kind":"validation","step":n,"tokens":n,"loss":x,"perplexity":x,"bits_per_byte":x,"seconds":x}
// Losses are in nats a token; tokens and seconds count from the start of the run, across resumes; a number
// that is not finite is null and reads as NaN. "step" in a resume line is the last step kept: the lines of
// later steps before it are of work done again, and are left out.
struct TrainingStep {
  std::int64_t step, tokens;
  double loss, learning_rate, gradient_norm, seconds, tokens_per_second;
  bool skipped;
};

struct Validation {
  std::int64_t step, tokens;
  double loss, perplexity, bits_per_byte, seconds;
};

struct RunMetrics {
  std::string name;  // the folder's
  std::string model, device, compute_type, started, data;
  std::int64_t parameters = 0, resumes = 0;
  std::int64_t unreadable_lines = 0;  // lines that are none of the above, as a crash may leave them
  std::vector<TrainingStep> steps;
  std::vector<Validation> validations;
};

// Lines of other kinds are passed over. A last line without its newline that does not parse is one being
// written, or torn, and is not counted. Request errors: no line could be read.
RunMetrics parse_metrics(std::string_view text, std::string_view where);
// metrics.jsonl of a run folder.
RunMetrics read_metrics(const std::filesystem::path& run_folder);

// What the evaluations print, one JSON object a line, as `megalodon eval --json` does:
//   {"kind":"ppl","model":"name","context":n,"loss":x,"perplexity":x,"bits_per_byte":x,"tokens":n,"seconds":x}
//   {"kind":"stream","model":"name","position":n,"seconds_per_token":x,"resident_bytes":n}
struct ContextResult {
  std::string model;
  std::int64_t context, tokens;
  double loss, perplexity, bits_per_byte, seconds;
};

struct StreamResult {
  std::string model;
  std::int64_t position, resident_bytes;
  double seconds_per_token;
};

struct Results {
  std::vector<ContextResult> contexts;  // models in the order of their first line, contexts ascending
  std::vector<StreamResult> streams;    // likewise, positions ascending
};

// Adds the lines of `text` to `results`. Lines of other kinds are passed over; a line that is not JSON or
// lacks a member is a request error that names it.
void parse_results(std::string_view text, std::string_view where, Results& results);
Results read_results(const std::vector<std::filesystem::path>& files);

}  // namespace megalodon::report
