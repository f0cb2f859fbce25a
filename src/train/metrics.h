#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace megalodon::train {

struct StepMetrics {
  int64_t step, tokens;  // both counted from the start of the run, this step included
  double loss;           // nats a token
  double learning_rate;
  double gradient_norm;
  double seconds;  // of training so far, earlier sittings included
  double tokens_per_second;
  bool skipped;  // loss or gradient was not finite; the step changed nothing
};

struct ValidationMetrics {
  int64_t step, tokens;
  double loss, perplexity, bits_per_byte;
  double seconds;  // of training so far
};

// Who is told of a run's progress: metrics.jsonl, TensorBoard, a progress bar.
class Listener {
 public:
  virtual ~Listener() = default;
  virtual void on_start(
      const Json& facts) = 0;  // {"kind": "start" or "resume", "step", "parameters", "model", ...}
  virtual void on_step(const StepMetrics& metrics) = 0;
  virtual void on_validation(const ValidationMetrics& metrics) = 0;
};

// RUN/metrics.jsonl: one object a line, of kind start, resume, step or validation. Lines beyond
// `resumed_step`, of work that was lost and is done again, are dropped when it opens.
class MetricsFile : public Listener {
 public:
  MetricsFile(const std::filesystem::path& path, int64_t resumed_step);
  void on_start(const Json& facts) override;
  void on_step(const StepMetrics& metrics) override;
  void on_validation(const ValidationMetrics& metrics) override;

 private:
  void append(const Json& object) { file_->append(dump_json(object)); }
  std::unique_ptr<LineAppender> file_;
};

}  // namespace megalodon::train
