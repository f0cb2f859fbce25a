#include "tasks/row.h"

#include <algorithm>

#include "base/error.h"

namespace megalodon::tasks {
namespace {

// `text` from a little before the byte `position`, of a length that a person reads.
std::string around(std::string_view text, std::size_t position) {
  constexpr std::size_t before = 30, most = 80;
  if (text.size() <= most) return one_line(text);
  const std::size_t begin = position - std::min(position, before);
  const std::string_view part = text.substr(begin, most);
  return (begin > 0 ? "..." : "") + one_line(part) + (begin + part.size() < text.size() ? "..." : "");
}

void compare(const std::string& member, const Json& expected, const Json& got,
             std::vector<RowDifference>& differences) {
  if (expected == got) return;
  const std::string a = dump_json(expected), b = dump_json(got);
  const auto position = static_cast<std::size_t>(std::ranges::mismatch(a, b).in1 - a.begin());
  differences.push_back({member, around(a, position), around(b, position)});
}

}  // namespace

std::string problem_row(const Task& task, const Problem& problem) {
  nlohmann::ordered_json row;
  row["task"] = task.row_name();
  const Json fields = task.fields(problem.prompt);
  for (const auto& [member, value] : fields.items()) row[member] = value;
  row["prompt"] = problem.prompt;
  row["target"] = problem.target;
  return row.dump();
}

std::vector<RowDifference> check_row(std::string_view line, std::string_view where) {
  const Json row = parse_json(line, where);
  const auto name = json_member<std::string>(row, "task", where);
  const auto prompt = json_member<std::string>(row, "prompt", where);
  const auto target = json_member<std::string>(row, "target", where);
  std::vector<RowDifference> differences;
  try {
    const Task& task = find_task(name);
    compare("target", task.solve(prompt), target, differences);
    const Json fields = task.fields(prompt);
    for (const auto& [member, value] : fields.items()) {
      if (const auto found = row.find(member); found != row.end()) {
        compare(member, value, *found, differences);
      }
    }
  } catch (const Error& error) {
    fail_request("malformed row", where, error.what());
  }
  return differences;
}

}  // namespace megalodon::tasks
