#include "improve/metrics.h"

namespace megalodon::improve {
namespace {

bool stays(const std::string& line, int64_t resumed_step) {
  const auto object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer()) return false;
  const auto step = object["step"].get<int64_t>();
  const auto kind = object.value("kind", "");
  const bool told_again = kind == "labels" || kind == "evaluation" || kind == "round";
  return told_again ? step < resumed_step : step <= resumed_step;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t resumed_step) {
  std::string kept;
  for (const auto& line : read_lines(path)) {
    if (stays(line, resumed_step)) kept += line + "\n";
  }
  write_file_atomically(path, kept);
  file_ = std::make_unique<LineAppender>(path);
}

void MetricsFile::on_step(const StepMetrics& m) {
  Json object{{"kind", "step"},
              {"round", m.round},
              {"step", m.step},
              {"tokens", m.tokens},
              {"loss", m.loss},
              {"learning_rate", m.learning_rate},
              {"gradient_norm", m.gradient_norm},
              {"seconds", m.seconds}};
  if (m.skipped) object["skipped"] = true;
  append(object);
}

void MetricsFile::on_labels(int64_t round, int64_t step, const LabelReport& report) {
  Json object = to_json(report);
  object.update({{"kind", "labels"}, {"round", round}, {"step", step}});
  append(object);
}

void MetricsFile::on_evaluation(int64_t round, int64_t step, const Evaluation& e) {
  Json object{{"kind", "evaluation"},       {"round", round},         {"step", step},
              {"difficulty", e.difficulty}, {"problems", e.problems}, {"mean_accuracy", e.mean()},
              {"accuracy", e.accuracy}};
  if (!e.separable) object["training_may_have_seen_these"] = true;
  append(object);
}

void MetricsFile::on_round(int64_t round, int64_t step, const std::string& solved,
                           const std::map<std::string, double>& seconds) {
  append({{"kind", "round"}, {"round", round}, {"step", step}, {"solved", solved}, {"seconds", seconds}});
}

}  // namespace megalodon::improve
