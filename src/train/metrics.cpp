#include "train/metrics.h"

#include <string>

#include "base/error.h"

namespace megalodon::train {
namespace {

// The lines of metrics up to a step; torn or later ones are gone.
std::string lines_up_to(const std::string& text, int64_t step) {
  std::string kept;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;
    const auto line = text.substr(begin, end - begin + 1);
    const auto object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (object.is_object() && object.contains("step") && object["step"].is_number_integer() &&
        object["step"].get<int64_t>() <= step) {
      kept += line;
    }
    begin = end + 1;
  }
  return kept;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t resumed_step) {
  if (std::filesystem::exists(path)) write_file_atomically(path, lines_up_to(read_file(path), resumed_step));
  file_ = std::make_unique<LineAppender>(path);
}

void MetricsFile::on_start(const Json& facts) {
  append(facts);
}

void MetricsFile::on_step(const StepMetrics& m) {
  Json object{{"kind", "step"},
              {"step", m.step},
              {"tokens", m.tokens},
              {"loss", m.loss},
              {"learning_rate", m.learning_rate},
              {"gradient_norm", m.gradient_norm},
              {"seconds", m.seconds},
              {"tokens_per_second", m.tokens_per_second}};
  if (m.skipped) object["skipped"] = true;
  append(object);
}

void MetricsFile::on_validation(const ValidationMetrics& m) {
  append({{"kind", "validation"},
          {"step", m.step},
          {"tokens", m.tokens},
          {"loss", m.loss},
          {"perplexity", m.perplexity},
          {"bits_per_byte", m.bits_per_byte},
          {"seconds", m.seconds}});
}

}  // namespace megalodon::train
