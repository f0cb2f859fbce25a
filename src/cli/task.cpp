#include "tasks/task.h"

#include <cstdio>
#include <fstream>
#include <iostream>
#include <istream>

#include "base/error.h"
#include "cli/command.h"
#include "tasks/row.h"

namespace megalodon::cli {
namespace {

// Lines to stdout, many at a time.
class Lines {
 public:
  void add(std::string_view line) {
    buffer_.append(line).push_back('\n');
    if (buffer_.size() >= 1 << 16) flush();
  }
  void flush() {
    const bool written = std::fwrite(buffer_.data(), 1, buffer_.size(), stdout) == buffer_.size();
    buffer_.clear();
    if (!written || std::fflush(stdout) != 0) {
      fail_work("cannot write", "standard output", "check the space left where it goes");
    }
  }

 private:
  std::string buffer_;
};

struct SampleOptions {
  std::string task, difficulty, split = "training";
  std::int64_t base = 0, count = 10;
  double equal_share = 0;
  std::uint64_t seed = 1, start = 0;
  bool prompts = false;
};

int sample(const SampleOptions& o) {
  const tasks::Task& task = tasks::find_task(o.task);
  const bool by_base = o.difficulty.empty(), evaluation = o.split == "evaluation";
  if (by_base) {
    tasks::check_base(task, o.base);
    if (evaluation) fail_request("a base set has no evaluation split", "--split", "name a --difficulty");
  }
  if (o.equal_share != 0 && !task.has_two_operands()) {
    fail_request(o.task + " has no two operands", "--equal-share", "leave it out");
  }
  const tasks::Difficulty difficulty = by_base ? tasks::Difficulty{} : task.difficulty(o.difficulty);
  if (evaluation && !tasks::is_separable(task, difficulty)) {
    std::fprintf(stderr, "note: difficulty %s has too few problems to keep some from training\n",
                 o.difficulty.c_str());
  }
  Lines lines;
  const auto end = o.start + static_cast<std::uint64_t>(o.count);
  for (std::uint64_t index = o.start; index != end; ++index) {
    const tasks::Problem problem = by_base ? tasks::base_problem(task, o.base, o.equal_share, o.seed, index)
                                   : evaluation ? tasks::evaluation_problem(task, difficulty, o.seed, index)
                                                : tasks::training_problem(task, difficulty, o.seed, index);
    lines.add(o.prompts ? problem.prompt : tasks::problem_row(task, problem));
  }
  lines.flush();
  return 0;
}

// The next line, without its end.
bool next_line(std::istream& stream, std::string& line, const std::string& name) {
  const bool read = static_cast<bool>(std::getline(stream, line));
  if (stream.bad()) fail_request("cannot read", name, "check that it is a file");
  if (read && line.ends_with('\r')) line.pop_back();
  return read;
}

int solve(const std::string& name, bool json) {
  const tasks::Task& task = tasks::find_task(name);
  Lines lines;
  bool failed = false;
  std::string prompt;
  for (std::int64_t number = 1; next_line(std::cin, prompt, "standard input"); ++number) {
    try {
      const std::string target = task.solve(prompt);
      lines.add(json ? tasks::problem_row(task, {prompt, target}) : target);
    } catch (const Error& error) {
      failed = true;
      std::fprintf(stderr, "error: line %lld: %s\n", static_cast<long long>(number), error.what());
    }
    if (std::cin.rdbuf()->in_avail() <= 0) lines.flush();  // someone may wait for the answer
  }
  lines.flush();
  return failed ? 1 : 0;
}

struct Counts {
  std::int64_t rows = 0, differing = 0, malformed = 0;
};

void check_line(const std::string& line, const std::string& file, bool json, Lines& lines, Counts& counts) {
  const std::string where = file + ":" + std::to_string(++counts.rows);
  const Json at{{"file", file}, {"line", counts.rows}};
  try {
    const auto differences = tasks::check_row(line, where);
    counts.differing += !differences.empty();
    for (const auto& [member, expected, got] : differences) {
      if (json) {
        Json object = at;
        object.update({{"member", member}, {"expected", expected}, {"got", got}});
        lines.add(dump_json(object));
      } else {
        std::string text(where);
        text.append(": ").append(member).append(": expected ").append(expected).append(", got ").append(got);
        lines.add(text);
      }
    }
  } catch (const Error& error) {
    ++counts.malformed;
    std::fprintf(stderr, "error: %s\n", error.what());
    if (!json) return;
    Json object = at;
    object["error"] = error.what();
    lines.add(dump_json(object));
  }
}

Counts check_file(const std::string& path, bool json, Lines& lines) {
  const std::string name = path == "-" ? "standard input" : path;
  std::ifstream file;
  if (path != "-") {
    file.open(path);
    if (!file) fail_request("cannot open", path, "name a file of problems, or - for standard input");
  }
  std::istream& stream = path == "-" ? std::cin : file;
  Counts counts;
  for (std::string line; next_line(stream, line, name);) check_line(line, name, json, lines, counts);
  if (counts.rows == 0) fail_request("no rows", name, "name a file of problems, one a line");
  return counts;
}

int check(const std::vector<std::string>& files, bool json) {
  bool passed = true;
  for (const std::string& path : files) {
    Lines lines;
    const Counts counts = check_file(path, json, lines);
    const bool right = counts.differing == 0 && counts.malformed == 0;
    passed = passed && right;
    if (json) {
      lines.add(dump_json({{"file", path},
                           {"rows", counts.rows},
                           {"differing", counts.differing},
                           {"malformed", counts.malformed}}));
    } else {
      lines.add(path + ": " + std::to_string(counts.rows) + " rows, " +
                (right ? "all right"
                       : std::to_string(counts.differing) + " differ, " + std::to_string(counts.malformed) +
                             " malformed"));
    }
    lines.flush();
  }
  return passed ? 0 : 1;
}

void add_sample(CLI::App& group, Run& chosen) {
  auto* command = group.add_subcommand("sample", "Draw problems, one JSON object a line");
  auto o = std::make_shared<SampleOptions>();
  command->add_option("--task", o->task, "which")->required();
  auto* which = command->add_option_group("which problems");
  which->add_option("--difficulty", o->difficulty, "12, 3+12, 3x5, 9/40: see docs/tasks.md");
  auto* base = which->add_option("--base", o->base, "of the labelled set up to this difficulty");
  which->require_option(1);
  command->add_option("--equal-share", o->equal_share, "how many have operands of equal length")
      ->needs(base)
      ->check(CLI::Range(0.0, 1.0));
  command->add_option("--count", o->count, "how many")->check(CLI::NonNegativeNumber)->capture_default_str();
  command->add_option("--seed", o->seed, "which random numbers")->capture_default_str();
  command->add_option("--start", o->start, "the index of the first")->capture_default_str();
  command->add_option("--split", o->split, "training, or evaluation: problems that training never draws")
      ->check(CLI::IsMember({"training", "evaluation"}))
      ->capture_default_str();
  command->add_flag("--prompts", o->prompts, "print bare prompts");
  command->callback([o, &chosen] { chosen = [o] { return sample(*o); }; });
}

}  // namespace

void add_task(CLI::App& program, Run& chosen) {
  auto* group = program.add_subcommand("task", "Problems of self-improvement: draw, solve, check");
  group->require_subcommand(1);
  add_sample(*group, chosen);

  auto* command = group->add_subcommand("solve", "Prompts on stdin, one a line, to targets on stdout");
  auto task = std::make_shared<std::string>();
  auto json = std::make_shared<bool>(false);
  command->add_option("--task", *task, "which")->required();
  command->add_flag("--json", *json, "print whole problems, one JSON object a line");
  command->callback([task, json, &chosen] { chosen = [task, json] { return solve(*task, *json); }; });

  command =
      group->add_subcommand("check", "Solve the problems of jsonl files again; name the rows that differ");
  auto files = std::make_shared<std::vector<std::string>>();
  command->add_option("FILE", *files, "jsonl files; - is standard input")->required();
  command->add_flag("--json", *json, "print JSON objects: a line each difference, and one a file");
  command->callback([files, json, &chosen] { chosen = [files, json] { return check(*files, *json); }; });
}

}  // namespace megalodon::cli
