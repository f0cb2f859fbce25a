#include "report/metrics.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"

namespace megalodon::report {
namespace {

struct Line {
  std::string_view text;
  std::string where;  // path:line
  bool whole;         // ended by a newline
};

std::vector<Line> lines_of(std::string_view text, std::string_view where) {
  std::vector<Line> lines;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) {
      lines.push_back(
          {line, std::string(where) + ":" + std::to_string(number), end != std::string_view::npos});
    }
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
  return lines;
}

// A number that may be null, as JSON must write what is not finite.
double measured(const Json& object, std::string_view key, std::string_view where) {
  const auto found = object.find(key);
  if (found != object.end() && found->is_null()) return std::numeric_limits<double>::quiet_NaN();
  return json_member<double>(object, key, where);
}

void add_line(RunMetrics& run, const Json& line, std::string_view where) {
  const std::string kind = json_member<std::string>(line, "kind", where);
  const auto integer = [&](const char* key) { return json_member<std::int64_t>(line, key, where); };
  const auto number = [&](const char* key) { return measured(line, key, where); };
  if (kind == "step") {
    run.steps.push_back({integer("step"), integer("tokens"), number("loss"), number("learning_rate"),
                         number("gradient_norm"), number("seconds"), number("tokens_per_second"),
                         json_member<bool>(line, "skipped", where, false)});
  } else if (kind == "validation") {
    run.validations.push_back({integer("step"), integer("tokens"), number("loss"), number("perplexity"),
                               number("bits_per_byte"), number("seconds")});
  } else if (kind == "start" || kind == "resume") {
    const std::int64_t kept = integer("step");
    const auto word = [&](const char* key) { return json_member<std::string>(line, key, where, ""); };
    if (run.started.empty()) run.started = word("time");
    run.model = word("model");
    run.device = word("device");
    run.compute_type = word("compute_type");
    run.data = word("data");
    run.parameters = json_member<std::int64_t>(line, "parameters", where, 0);
    if (kind == "resume") {
      ++run.resumes;
      std::erase_if(run.steps, [&](const TrainingStep& step) { return step.step > kept; });
      std::erase_if(run.validations, [&](const Validation& validation) { return validation.step > kept; });
    }
  }
}

template <class Result, class Position>
void order_by_model(std::vector<Result>& results, Position position) {
  std::vector<std::string> models;
  for (const Result& result : results) {
    if (std::find(models.begin(), models.end(), result.model) == models.end()) models.push_back(result.model);
  }
  const auto rank = [&](const Result& result) {
    return std::pair(std::find(models.begin(), models.end(), result.model) - models.begin(),
                     position(result));
  };
  std::sort(results.begin(), results.end(),
            [&](const Result& a, const Result& b) { return rank(a) < rank(b); });
}

}  // namespace

RunMetrics parse_metrics(std::string_view text, std::string_view where) {
  RunMetrics run;
  std::size_t readable = 0;
  for (const Line& line : lines_of(text, where)) {
    try {
      add_line(run, parse_json(line.text, line.where), line.where);
      ++readable;
    } catch (const Error&) {
      if (line.whole) ++run.unreadable_lines;
    }
  }
  if (readable == 0) {
    fail_request("no training metrics", where, "give the folder of a run that has done at least one step");
  }
  return run;
}

RunMetrics read_metrics(const std::filesystem::path& run_folder) {
  const std::filesystem::path path = run_folder / "metrics.jsonl";
  RunMetrics run = parse_metrics(read_file(path), path.string());
  run.name = std::filesystem::absolute(run_folder / "").parent_path().filename().string();
  return run;
}

void parse_results(std::string_view text, std::string_view where, Results& results) {
  for (const Line& line : lines_of(text, where)) {
    const Json object = parse_json(line.text, line.where);
    const std::string kind = json_member<std::string>(object, "kind", line.where, "");
    const auto integer = [&](const char* key) { return json_member<std::int64_t>(object, key, line.where); };
    const auto number = [&](const char* key) { return measured(object, key, line.where); };
    const auto model = [&] { return json_member<std::string>(object, "model", line.where); };
    if (kind == "ppl") {
      results.contexts.push_back({model(), integer("context"), integer("tokens"), number("loss"),
                                  number("perplexity"), number("bits_per_byte"), number("seconds")});
    } else if (kind == "stream") {
      results.streams.push_back(
          {model(), integer("position"), integer("resident_bytes"), number("seconds_per_token")});
    }
  }
  order_by_model(results.contexts, [](const ContextResult& result) { return result.context; });
  order_by_model(results.streams, [](const StreamResult& result) { return result.position; });
}

Results read_results(const std::vector<std::filesystem::path>& files) {
  Results results;
  for (const auto& file : files) parse_results(read_file(file), file.string(), results);
  return results;
}

}  // namespace megalodon::report
