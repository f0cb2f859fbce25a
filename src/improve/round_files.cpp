#include "improve/round_files.h"

#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/file.h"

namespace megalodon::improve {
namespace {
namespace fs = std::filesystem;

double number_or_nan(const Json& json, std::string_view key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_number() ? found->get<double>()
                                                   : std::numeric_limits<double>::quiet_NaN();
}

std::string place(const fs::path& path, std::size_t line) {
  return path.string() + ":" + std::to_string(line + 1);
}

}  // namespace

std::vector<std::string> read_lines(const fs::path& path) {
  std::vector<std::string> lines;
  if (!fs::exists(path)) return lines;
  const auto text = read_file(path);
  for (std::size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1)
    lines.push_back(text.substr(begin, end - begin));
  return lines;
}

Json to_json(const LabelReport& r) {
  Json left = Json::array();
  for (const auto& [filter, count] : r.left) left.push_back({{"filter", filter}, {"left", count}});
  return {{"generated", r.generated},
          {"kept", r.kept},
          {"unended", r.unended},
          {"filters", left},
          {"accuracy_before", r.accuracy_before},
          {"accuracy_after", r.accuracy_after}};
}

LabelReport label_report_from_json(const Json& json, std::string_view where) {
  LabelReport r{json_member<int64_t>(json, "generated", where), json_member<int64_t>(json, "kept", where),
                json_member<int64_t>(json, "unended", where),   {},
                number_or_nan(json, "accuracy_before"),         number_or_nan(json, "accuracy_after")};
  if (json.contains("filters") && json["filters"].is_array()) {
    for (const auto& filter : json["filters"]) {
      r.left.emplace_back(json_member<std::string>(filter, "filter", where),
                          json_member<int64_t>(filter, "left", where));
    }
  }
  return r;
}

RoundFiles::RoundFiles(const fs::path& run, int64_t round, const tasks::Task& task)
    : folder_(run / "rounds" / std::to_string(round)), task_(task) {
  fs::create_directories(folder_);
}

Plan RoundFiles::plan() const {
  const auto path = folder_ / "plan.json";
  const auto json = parse_json(read_file(path), path.string());
  Plan plan;
  plan.reach = json_member<int64_t>(json, "reach", path.string());
  if (!json.contains("difficulties") || !json["difficulties"].is_array()) {
    fail_request("no difficulties", path.string(), "remove the file: it is made again");
  }
  for (const auto& text : json["difficulties"]) {
    plan.difficulties.push_back(task_.difficulty(text.is_string() ? text.get<std::string>() : text.dump()));
  }
  return plan;
}

void RoundFiles::write_plan(const Plan& plan) const {
  Json difficulties = Json::array();
  for (const auto& d : plan.difficulties) difficulties.push_back(task_.text(d));
  write_file_atomically(folder_ / "plan.json",
                        Json{{"reach", plan.reach}, {"difficulties", difficulties}}.dump(2) + "\n");
}

std::vector<std::vector<Example>> RoundFiles::data(int64_t models) const {
  std::vector<std::vector<Example>> sets(static_cast<std::size_t>(models));
  const auto path = folder_ / "data.jsonl";
  if (!fs::exists(path))
    fail_request("the data of the round is missing", path.string(), "restore the file, or start another run");
  for (std::size_t i = 0; const auto& line : read_lines(path)) {
    const auto where = place(path, i++);
    const auto row = parse_json(line, where);
    const auto model = json_member<int64_t>(row, "model", where);
    if (model < 1 || model > models) fail_request("no such model", where, "the file is another run's");
    sets[static_cast<std::size_t>(model - 1)].push_back({json_member<std::string>(row, "prompt", where),
                                                         json_member<std::string>(row, "label", where),
                                                         json_member<bool>(row, "ended", where, true)});
  }
  return sets;
}

LabelReport RoundFiles::labels() const {
  const auto path = folder_ / "labels.json";
  return label_report_from_json(parse_json(read_file(path), path.string()), path.string());
}

void RoundFiles::write_data(const std::vector<Candidate>& candidates,
                            const std::vector<tasks::Difficulty>& difficulties,
                            const LabelReport& report) const {
  AtomicFile file(folder_ / "data.jsonl");
  for (const auto& c : candidates) {
    if (!c.kept) continue;
    Json row{{"model", c.model + 1},
             {"difficulty", task_.text(difficulties[static_cast<std::size_t>(c.difficulty)])},
             {"prompt", c.prompt},
             {"label", c.answer().text}};
    if (!c.answer().ended) row["ended"] = false;
    file.write(dump_json(row) + "\n");
  }
  file.commit();
  write_file_atomically(folder_ / "labels.json", dump_json(to_json(report)) + "\n");
}

std::string RoundFiles::answer_line(const Candidate& c, const std::string& difficulty) {
  Json answers = Json::array();
  for (const auto& reply : c.replies) {
    answers.push_back({{"text", reply.text},
                       {"ended", reply.ended},
                       {"tokens", reply.tokens},
                       {"log_probability", reply.log_probability}});
  }
  return dump_json(
      {{"model", c.model + 1}, {"difficulty", difficulty}, {"prompt", c.prompt}, {"answers", answers}});
}

Candidate RoundFiles::answer(const std::string& line, std::string_view where) const {
  const auto row = parse_json(line, where);
  Candidate c;
  c.model = json_member<int64_t>(row, "model", where) - 1;
  c.prompt = json_member<std::string>(row, "prompt", where);
  if (!row.contains("answers") || !row["answers"].is_array()) {
    fail_request("no answers", where, "remove the file: it is made again");
  }
  for (const auto& reply : row["answers"]) {
    c.replies.push_back(
        {json_member<std::string>(reply, "text", where), json_member<bool>(reply, "ended", where),
         json_member<int64_t>(reply, "tokens", where), json_member<double>(reply, "log_probability", where)});
  }
  if (c.model < 0 || static_cast<std::size_t>(c.model) >= c.replies.size())
    fail_request("no such model", where, "the file is another run's");
  c.label = static_cast<std::size_t>(c.model);
  return c;
}

void RoundFiles::add_time(const std::string& phase, double seconds) const {
  LineAppender(folder_ / "times.jsonl").append(dump_json({{"phase", phase}, {"seconds", seconds}}));
}

std::map<std::string, double> RoundFiles::times() const {
  std::map<std::string, double> total;
  const auto path = folder_ / "times.jsonl";
  for (std::size_t i = 0; const auto& line : read_lines(path)) {
    const auto where = place(path, i++);
    const auto row = parse_json(line, where);
    total[json_member<std::string>(row, "phase", where)] += json_member<double>(row, "seconds", where);
  }
  return total;
}

}  // namespace megalodon::improve
