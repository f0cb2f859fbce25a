#include "report/run_report.h"

#include "base/log.h"
#include "cli/command.h"

namespace megalodon::cli {
namespace {

struct Options {
  std::string out, title = "Comparison";
  std::vector<std::string> notes, runs, results;
};

int run(const Options& o) {
  report::Comparison comparison{
      o.title, o.notes, {o.runs.begin(), o.runs.end()}, {o.results.begin(), o.results.end()}};
  report::write_comparison_report(o.out, comparison);
  log_note("report in " + o.out);
  return 0;
}

}  // namespace

void add_report(CLI::App& program, Run& chosen) {
  auto* command =
      program.add_subcommand("report", "Write one page that sets runs and evaluations side by side");
  auto o = std::make_shared<Options>();
  command->add_option("OUT", o->out, "the HTML file to write")->required();
  command->add_option("--run", o->runs, "run directories");
  command->add_option("--results", o->results, "files of what eval --json printed");
  command->add_option("--title", o->title, "of the page")->capture_default_str();
  command->add_option("--note", o->notes, "paragraphs to add: where the text is from, on what machine");
  command->callback([o, &chosen] { chosen = [o] { return run(*o); }; });
}

}  // namespace megalodon::cli
