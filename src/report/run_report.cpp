#include "report/run_report.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/file.h"
#include "base/log.h"
#include "report/html.h"

namespace megalodon::report {
namespace {

constexpr std::size_t kDrawnPoints = 1000;
constexpr double kSmoothing = 0.8;

template <class Record>
double place(const Record& record, Against against) {
  switch (against) {
    case Against::step:
      return static_cast<double>(record.step);
    case Against::tokens:
      return static_cast<double>(record.tokens);
    case Against::seconds:
      return record.seconds;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

LineChart loss_chart(const RunMetrics& run, Against against, std::string title, std::string x_label) {
  LineChart chart{std::move(title),
                  std::move(x_label),
                  "loss, nats a token (log scale)",
                  {},
                  Scale::logarithmic,
                  false,
                  {},
                  {}};
  chart.series.push_back(training_curve(run, against, &TrainingStep::loss, "training"));
  chart.series.back().smoothing = kSmoothing;
  if (!run.validations.empty()) chart.series.push_back(validation_curve(run, against, "validation"));
  return chart;
}

std::string step_chart(const RunMetrics& run, std::string title, std::string unit, Scale scale,
                       double TrainingStep::* quantity) {
  LineChart chart{std::move(title), "step", std::move(unit), {}, scale, scale == Scale::linear, {}, {}};
  chart.series.push_back(training_curve(run, Against::step, quantity, chart.title));
  return draw(chart);
}

std::string skipped_chart(const RunMetrics& run) {
  Series series{"skipped", {}, {}, {}, {}, 0};
  double count = 0;
  for (const TrainingStep& step : run.steps) {
    count += step.skipped;
    series.x.push_back(static_cast<double>(step.step));
    series.y.push_back(count);
  }
  LineChart chart{"Steps skipped so far", "step", "steps", {}, {}, true, {}, {}};
  chart.series.push_back(downsampled(series, kDrawnPoints));
  return draw(chart);
}

std::int64_t skipped_steps(const RunMetrics& run) {
  return std::count_if(run.steps.begin(), run.steps.end(), [](const TrainingStep& s) { return s.skipped; });
}

std::string lead_sentence(const RunMetrics& run) {
  std::string lead = run.model.empty() ? "The model" : "A " + run.model + " model";
  if (run.parameters > 0) lead += " of " + human_count(static_cast<double>(run.parameters)) + " parameters";
  if (run.steps.empty()) return lead + " has not finished a step yet.";
  const TrainingStep& last = run.steps.back();
  lead += " after " + grouped(last.step) + " steps and " + human_count(static_cast<double>(last.tokens)) +
          " tokens";
  if (run.validations.empty()) {
    return lead + ": training loss " + rounded(final_training_loss(run), 4) + ", not validated yet.";
  }
  const Validation& validation = run.validations.back();
  return lead + ": validation loss " + rounded(validation.loss, 4) + ", which is perplexity " +
         rounded(validation.perplexity, 4) + " or " + rounded(validation.bits_per_byte, 4) +
         " bits per byte.";
}

std::vector<KeyFigure> key_figures(const RunMetrics& run) {
  std::vector<KeyFigure> figures;
  if (!run.validations.empty()) {
    const Validation& last = run.validations.back();
    figures.push_back({rounded(last.bits_per_byte, 4), "bits per byte (validation)"});
    figures.push_back({rounded(last.perplexity, 4), "perplexity (validation)"});
    figures.push_back({rounded(last.loss, 4), "validation loss"});
  }
  if (!run.steps.empty()) {
    const TrainingStep& last = run.steps.back();
    figures.push_back({rounded(final_training_loss(run), 4), "training loss, last steps"});
    figures.push_back({human_count(static_cast<double>(last.tokens)), "tokens read"});
    figures.push_back({human_seconds(last.seconds), "training time"});
    const double rate = last.seconds > 0 ? static_cast<double>(last.tokens) / last.seconds
                                         : std::numeric_limits<double>::quiet_NaN();
    figures.push_back({short_number(rate, 3), "tokens a second, mean"});
    figures.push_back({grouped(skipped_steps(run)), "steps skipped"});
  }
  return figures;
}

void add_curves(Page& page, const RunMetrics& run) {
  page.section("Loss");
  page.charts({draw(loss_chart(run, Against::tokens, "Loss by tokens", "tokens")),
               draw(loss_chart(run, Against::seconds, "Loss by time", "seconds of training"))});
  if (run.steps.size() > kDrawnPoints) {
    page.paragraph("Each point is the mean of neighbouring steps, with their extremes as a pale band.");
  }
  page.section("Optimisation and speed");
  std::vector<std::string> charts = {
      step_chart(run, "Learning rate", "", Scale::linear, &TrainingStep::learning_rate),
      step_chart(run, "Gradient norm, before clipping", "", Scale::logarithmic, &TrainingStep::gradient_norm),
      step_chart(run, "Speed", "tokens a second", Scale::linear, &TrainingStep::tokens_per_second)};
  if (skipped_steps(run) > 0) {
    charts.push_back(skipped_chart(run));
  } else {
    page.paragraph("No step was skipped: every loss and gradient was finite.");
  }
  page.charts(charts);
}

void add_validations(Page& page, const RunMetrics& run) {
  if (run.validations.empty()) return;
  constexpr std::size_t most = 20;
  page.section("Validation");
  if (run.validations.size() > most)
    page.paragraph("The last 20 of " + grouped(static_cast<std::int64_t>(run.validations.size())) + ".");
  Table table{{"step", "tokens", "loss", "perplexity", "bits per byte"}, {}};
  const std::size_t first = run.validations.size() - std::min(most, run.validations.size());
  for (std::size_t i = first; i < run.validations.size(); ++i) {
    const Validation& row = run.validations[i];
    table.rows.push_back({grouped(row.step), grouped(row.tokens), rounded(row.loss, 4),
                          rounded(row.perplexity, 4), rounded(row.bits_per_byte, 4)});
  }
  page.table(table);
}

}  // namespace

Series training_curve(const RunMetrics& run, Against against, double TrainingStep::* quantity,
                      std::string name) {
  Series series{std::move(name), {}, {}, {}, {}, 0};
  for (const TrainingStep& step : run.steps) {
    series.x.push_back(place(step, against));
    series.y.push_back(step.*quantity);
  }
  return downsampled(series, kDrawnPoints);
}

Series validation_curve(const RunMetrics& run, Against against, std::string name) {
  Series series{std::move(name), {}, {}, {}, {}, 0};
  for (const Validation& validation : run.validations) {
    series.x.push_back(place(validation, against));
    series.y.push_back(validation.loss);
  }
  return downsampled(series, kDrawnPoints);
}

double final_training_loss(const RunMetrics& run) {
  double sum = 0, count = 0;
  const std::size_t begin = run.steps.size() - (run.steps.size() + 49) / 50;
  for (std::size_t i = begin; i < run.steps.size(); ++i) {
    if (!std::isfinite(run.steps[i].loss)) continue;
    sum += run.steps[i].loss;
    ++count;
  }
  return count > 0 ? sum / count : std::numeric_limits<double>::quiet_NaN();
}

std::string run_report_html(const RunMetrics& run, std::string_view config) {
  Page page("Training run " + run.name, lead_sentence(run));
  page.key_figures(key_figures(run));
  if (!run.steps.empty()) add_curves(page, run);
  add_validations(page, run);
  page.section("The run");
  Table about{{"", ""}, {}};
  const auto row = [&](std::string name, std::string value) {
    if (!value.empty()) about.rows.push_back({std::move(name), std::move(value)});
  };
  row("model", run.model);
  row("parameters", run.parameters > 0 ? grouped(run.parameters) : "");
  row("data", run.data);
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

void write_run_report(const std::filesystem::path& run_folder) {
  const RunMetrics run = read_metrics(run_folder);
  const std::filesystem::path config = run_folder / "config.toml";
  const std::string text = std::filesystem::exists(config) ? read_file(config) : "";
  write_file_atomically(run_folder / "report.html", run_report_html(run, text));
}

}  // namespace megalodon::report
