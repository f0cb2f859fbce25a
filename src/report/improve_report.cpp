#include "report/improve_report.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "report/html.h"
#include "report/plot.h"

namespace megalodon::report {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr std::size_t kDrawnPoints = 1000, kShownWrong = 6;

template <class F>
void for_objects(std::string_view text, const F& use) {
  for (std::size_t begin = 0; begin < text.size();) {
    const auto end = std::min(text.find('\n', begin), text.size());
    const auto line = text.substr(begin, end - begin);
    if (!line.empty()) {
      Json object;
      try {
        object = parse_json(line, "");
      } catch (const Error&) {
        object = nullptr;
      }
      use(object, end == text.size());
    }
    begin = end + 1;
  }
}

double number(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? found->get<double>() : kNone;
}
std::int64_t integer(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number_integer() ? found->get<std::int64_t>() : 0;
}
std::string text_of(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

void read_start(const Json& o, ImproveRun& run) {
  if (text_of(o, "kind") == "resume") ++run.resumes;
  if (run.started.empty()) run.started = text_of(o, "time");
  run.task = text_of(o, "task");
  run.model = text_of(o, "model");
  run.device = text_of(o, "device");
  run.compute_type = text_of(o, "compute_type");
  run.base = integer(o, "base");
  run.rounds = integer(o, "rounds");
  run.models = integer(o, "models");
  run.parameters = integer(o, "parameters");
}

void read_labels(const Json& o, ImproveRun& run) {
  ImproveRun::Labels labels{integer(o, "generated"),      integer(o, "kept"),          integer(o, "unended"),
                            number(o, "accuracy_before"), number(o, "accuracy_after"), {}};
  if (const auto filters = o.find("filters"); filters != o.end() && filters->is_array()) {
    for (const auto& f : *filters) {
      if (f.is_object()) labels.left.emplace_back(text_of(f, "filter"), integer(f, "left"));
    }
  }
  run.labels[integer(o, "round")] = labels;
}

void read_evaluation(const Json& o, ImproveRun& run) {
  auto& round = run.evaluations[integer(o, "round")];
  const auto difficulty = text_of(o, "difficulty");
  if (std::find(run.difficulties.begin(), run.difficulties.end(), difficulty) == run.difficulties.end())
    run.difficulties.push_back(difficulty);
  round.accuracy[difficulty] = number(o, "mean_accuracy");
  const auto seen = o.find("training_may_have_seen_these");
  if (seen != o.end() && seen->is_boolean() && seen->get<bool>()) run.inseparable.insert(difficulty);
}

void read_round(const Json& o, ImproveRun& run) {
  auto& round = run.evaluations[integer(o, "round")];
  round.solved = text_of(o, "solved");
  round.evaluated = true;
  if (const auto seconds = o.find("seconds"); seconds != o.end() && seconds->is_object()) {
    for (const auto& [phase, value] : seconds->items()) {
      if (value.is_number()) round.seconds[phase] = value.get<double>();
    }
  }
}

// The difficulty as a number where it is one, otherwise its place among all.
double height(const ImproveRun& run, const std::string& difficulty) {
  std::int64_t value = 0;
  const auto* const end = difficulty.data() + difficulty.size();
  if (const auto [rest, error] = std::from_chars(difficulty.data(), end, value);
      error == std::errc{} && rest == end)
    return static_cast<double>(value);
  const auto found = std::find(run.difficulties.begin(), run.difficulties.end(), difficulty);
  return found == run.difficulties.end() ? 0 : static_cast<double>(found - run.difficulties.begin() + 1);
}

std::string percent(double share) {
  if (std::isnan(share)) return "–";
  char text[32];
  std::snprintf(text, sizeof text, "%.2f %%", 100 * share);
  return text;
}

double total_seconds(const ImproveRun& run) {
  double total = 0;
  for (const auto& [number, round] : run.evaluations) {
    for (const auto& [phase, seconds] : round.seconds) total += seconds;
  }
  return total;
}

std::string lead_sentence(const ImproveRun& run) {
  const auto models = run.models == 1 ? std::string("A model") : grouped(run.models) + " models";
  auto lead = models + " of " + human_count(static_cast<double>(run.parameters)) + " parameters";
  if (run.evaluations.empty()) return lead + ", not evaluated yet.";
  const auto& [last, round] = *run.evaluations.rbegin();
  const auto& first = run.evaluations.begin()->second;
  return lead + (run.models == 1 ? " was" : " were") + " shown the answers of " + run.task +
         " up to difficulty " + grouped(run.base) + " and then taught " +
         (run.models == 1 ? "itself" : "themselves") +
         ": solved after round 0: " + (first.solved.empty() ? "nothing" : first.solved) + "; after round " +
         grouped(last) + ": " + (round.solved.empty() ? "nothing" : round.solved) + ".";
}

HeatMap accuracy_map(const ImproveRun& run) {
  HeatMap map{"Accuracy by difficulty and round", "round", "difficulty", {}, {}, {}, 0, 1};
  for (const auto& [round, unused] : run.evaluations) map.columns.push_back(std::to_string(round));
  for (auto row = run.difficulties.rbegin(); row != run.difficulties.rend(); ++row) {
    map.rows.push_back(*row);
    auto& values = map.values.emplace_back();
    for (const auto& [number, round] : run.evaluations) {
      const auto found = round.accuracy.find(*row);
      values.push_back(found == round.accuracy.end() ? kNone : found->second);
    }
  }
  return map;
}

void add_rounds(Page& page, const ImproveRun& run) {
  Series solved{"solved at 0.99", {}, {}, {}, {}, 0};
  for (const auto& [number, round] : run.evaluations) {
    solved.x.push_back(static_cast<double>(number));
    solved.y.push_back(height(run, round.solved));
  }
  LineChart hardest{
      "Hardest difficulty at 0.99 or better", "round", "difficulty", {}, {}, true, {}, {solved}};
  Series before{"before the filters", {}, {}, {}, {}, 0}, after{"after", {}, {}, {}, {}, 0};
  for (const auto& [number, labels] : run.labels) {
    for (auto* series : {&before, &after}) series->x.push_back(static_cast<double>(number));
    before.y.push_back(labels.before);
    after.y.push_back(labels.after);
  }
  std::vector<std::string> charts{draw(hardest)};
  if (!run.labels.empty()) {
    charts.push_back(draw(LineChart{
        "True labels among the self-made ones", "round", "share", {}, {}, false, {}, {before, after}}));
  }
  page.charts(charts);
}

void add_tables(Page& page, const ImproveRun& run) {
  page.section("Self-made data");
  if (run.labels.empty()) {
    page.paragraph("No round has made data yet.");
  } else {
    page.paragraph("True answers are compared for this report alone; filters and training never see them.");
    Table table{
        {"round", "answered", "never ended", "kept", "true before", "true after", "left by each filter"}, {}};
    for (const auto& [round, l] : run.labels) {
      std::vector<std::string> left;
      for (const auto& [filter, count] : l.left) left.push_back(filter + " " + grouped(count));
      table.rows.push_back({grouped(round), grouped(l.generated), grouped(l.unended), grouped(l.kept),
                            percent(l.before), percent(l.after), left.empty() ? "no filter" : joined(left)});
    }
    page.table(table);
  }
  page.section("Time");
  Table time{{"round"}, {}};
  std::vector<std::string> phases;
  for (const auto& [number, round] : run.evaluations) {
    for (const auto& [phase, seconds] : round.seconds) {
      if (std::find(phases.begin(), phases.end(), phase) == phases.end()) phases.push_back(phase);
    }
  }
  time.columns.insert(time.columns.end(), phases.begin(), phases.end());
  std::vector<double> sums(phases.size());
  const auto row = [&](const std::string& name, const std::vector<double>& values) {
    std::vector<std::string> cells{name};
    for (const double seconds : values) cells.push_back(seconds > 0 ? human_seconds(seconds) : "–");
    time.rows.push_back(std::move(cells));
  };
  for (const auto& [number, round] : run.evaluations) {
    std::vector<double> values;
    for (std::size_t i = 0; i < phases.size(); ++i) {
      const auto found = round.seconds.find(phases[i]);
      values.push_back(found == round.seconds.end() ? 0 : found->second);
      sums[i] += values.back();
    }
    row(grouped(number), values);
  }
  row("all", sums);
  page.table(time);
}

void add_wrong_answers(Page& page, const ImproveRun& run) {
  page.section("Wrong answers of the last round");
  if (run.wrong.empty()) return page.paragraph("None among the problems that were looked at.");
  std::string text;
  for (const auto& w : run.wrong) {
    text += "difficulty " + w.difficulty + (run.models > 1 ? ", model " + std::to_string(w.model) : "") +
            "\nprompt  " + w.prompt + "\ntarget  " + w.target + "\nanswer  " + w.answer +
            (w.ended ? "" : " … (never ended)") + "\n        " +
            std::string(static_cast<std::size_t>(w.first_wrong), ' ') + "^\n\n";
  }
  text.erase(text.size() - 1);
  page.preformatted(text);
}

}  // namespace

ImproveRun parse_improve_metrics(std::string_view text) {
  ImproveRun run;
  for_objects(text, [&](const Json& o, bool torn) {
    if (!o.is_object()) {
      run.unreadable_lines += !torn;
      return;
    }
    const auto kind = text_of(o, "kind");
    if (kind == "start" || kind == "resume") read_start(o, run);
    if (kind == "labels") read_labels(o, run);
    if (kind == "evaluation") read_evaluation(o, run);
    if (kind == "round") read_round(o, run);
    if (kind == "step") {
      run.steps.push_back(number(o, "step"));
      run.losses.push_back(number(o, "loss"));
      run.rates.push_back(number(o, "learning_rate"));
    }
  });
  return run;
}

void parse_wrong_answers(std::string_view text, ImproveRun& run) {
  for_objects(text, [&](const Json& o, bool) {
    const auto wrong = o.is_object() ? o.find("wrong") : o.end();
    if (!o.is_object() || wrong == o.end() || !wrong->is_array() || wrong->empty()) return;
    const auto& w = (*wrong)[0];
    if (!w.is_object() || run.wrong.size() >= kShownWrong) return;
    ImproveRun::Wrong shown{text_of(o, "difficulty"),
                            text_of(w, "prompt"),
                            text_of(w, "target"),
                            text_of(w, "answer"),
                            integer(w, "model"),
                            integer(w, "first_wrong"),
                            true};
    if (const auto ended = w.find("ended"); ended != w.end() && ended->is_boolean())
      shown.ended = ended->get<bool>();
    shown.first_wrong =
        std::clamp<std::int64_t>(shown.first_wrong, 0, static_cast<std::int64_t>(shown.answer.size()));
    run.wrong.push_back(std::move(shown));
  });
}

std::string improve_report_html(const ImproveRun& run, std::string_view config) {
  Page page("Self-improvement run " + run.name, lead_sentence(run));
  if (!run.evaluations.empty()) {
    const auto& last = *run.evaluations.rbegin();
    std::vector<KeyFigure> figures{
        {last.second.solved.empty() ? "–" : last.second.solved, "hardest difficulty solved"},
        {grouped(run.base), "hardest with labels"},
        {grouped(last.first) + " of " + grouped(run.rounds), "rounds"}};
    if (!run.labels.empty())
      figures.push_back({percent(run.labels.rbegin()->second.after), "true labels, last round"});
    figures.push_back({human_seconds(total_seconds(run)), "time"});
    page.key_figures(figures);
    page.section("Accuracy");
    page.paragraph("Exact match of whole answers, end included, on problems that no training set holds" +
                   std::string(run.models > 1 ? "; the mean of the models." : "."));
    if (!run.inseparable.empty())
      page.paragraph("Of difficulty " + joined(run.inseparable) +
                     " there are too few problems to keep some apart: training may have seen these.");
    page.charts({draw(accuracy_map(run))});
    add_rounds(page, run);
  }
  if (!run.steps.empty()) {
    page.section("Optimisation");
    const auto curve = [&](const char* name, const std::vector<double>& y) {
      return downsampled(Series{name, run.steps, y, {}, {}, 0}, kDrawnPoints);
    };
    page.charts({draw(LineChart{"Loss",
                                "step",
                                "nats a token (log scale)",
                                {},
                                Scale::logarithmic,
                                false,
                                {},
                                {curve("loss", run.losses)}}),
                 draw(LineChart{"Learning rate", "step", "", {}, {}, true, {}, {curve("rate", run.rates)}})});
  }
  if (!run.evaluations.empty()) {
    add_tables(page, run);
    add_wrong_answers(page, run);
  }
  page.section("The run");
  Table about{{"", ""}, {}};
  const auto row = [&](std::string name, std::string value) {
    if (!value.empty()) about.rows.push_back({std::move(name), std::move(value)});
  };
  row("task", run.task);
  row("model", run.model);
  row("models", grouped(run.models));
  row("parameters of each", grouped(run.parameters));
  row("device", run.device);
  row("compute type", run.compute_type);
  row("started", run.started);
  row("resumed", run.resumes == 0 ? "never" : run.resumes == 1 ? "once" : grouped(run.resumes) + " times");
  row("lines of metrics.jsonl left out as unreadable",
      run.unreadable_lines > 0 ? grouped(run.unreadable_lines) : "");
  page.table(about);
  if (!config.empty()) {
    page.section("Configuration");
    page.preformatted(config);
  }
  return page.html();
}

void write_improve_report(const std::filesystem::path& run_folder) {
  const auto text_in = [](const std::filesystem::path& path) {
    return std::filesystem::exists(path) ? read_file(path) : std::string();
  };
  auto run = parse_improve_metrics(text_in(run_folder / "metrics.jsonl"));
  run.name = std::filesystem::weakly_canonical(run_folder).filename().string();
  if (!run.evaluations.empty()) {
    const auto last = std::to_string(run.evaluations.rbegin()->first);
    parse_wrong_answers(text_in(run_folder / "rounds" / last / "evaluation.jsonl"), run);
  }
  write_file_atomically(run_folder / "report.html",
                        improve_report_html(run, text_in(run_folder / "config.toml")));
}

}  // namespace megalodon::report
