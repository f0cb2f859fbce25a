#pragma once
#include <filesystem>
#include <memory>

#include "base/file.h"
#include "improve/improvement.h"

namespace megalodon::improve {

// RUN/metrics.jsonl: one object a line, of kind start, resume, step, labels, evaluation or round. Lines of
// what is told again, or of work that was lost, are dropped when it opens.
class MetricsFile : public Listener {
 public:
  MetricsFile(const std::filesystem::path& path, int64_t resumed_step);
  void on_start(const Json& facts) override { append(facts); }
  void on_step(const StepMetrics& metrics) override;
  void on_labels(int64_t round, int64_t step, const LabelReport& report) override;
  void on_evaluation(int64_t round, int64_t step, const Evaluation& evaluation) override;
  void on_round(int64_t round, int64_t step, const std::string& solved,
                const std::map<std::string, double>& seconds) override;

 private:
  void append(const Json& object) { file_->append(dump_json(object)); }
  std::unique_ptr<LineAppender> file_;
};

}  // namespace megalodon::improve
