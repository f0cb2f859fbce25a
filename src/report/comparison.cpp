#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "base/file.h"
#include "base/log.h"
#include "report/html.h"
#include "report/run_report.h"

namespace megalodon::report {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// A run is called by its model, or by its folder where two runs share one.
std::vector<std::string> names_of(const std::vector<RunMetrics>& runs) {
  std::map<std::string, int> uses;
  for (const RunMetrics& run : runs) ++uses[run.model];
  std::vector<std::string> names(runs.size());
  std::transform(runs.begin(), runs.end(), names.begin(), [&](const RunMetrics& run) {
    return run.model.empty() || uses[run.model] > 1 ? run.name : run.model;
  });
  return names;
}

// "a", "a and b", "a, b and c".
std::string listed(const std::vector<std::string>& items) {
  std::string out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    out += i == 0 ? "" : i + 1 == items.size() ? " and " : ", ";
    out += items[i];
  }
  return out;
}

std::string percent(double share) {
  if (!std::isfinite(share)) return "–";
  return (share < 0 ? "−" : "+") + rounded(std::abs(share) * 100, 2) + "%";
}

double median(std::vector<double> values) {
  std::erase_if(values, [](double value) { return !std::isfinite(value); });
  if (values.empty()) return kNone;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Results of one model after another, as order_by_model of metrics.cpp left them.
template <class Result>
std::vector<std::vector<Result>> by_model(const std::vector<Result>& results) {
  std::vector<std::vector<Result>> groups;
  for (const Result& result : results) {
    if (groups.empty() || groups.back().front().model != result.model) groups.emplace_back();
    groups.back().push_back(result);
  }
  return groups;
}

std::string lead_sentence(const std::vector<RunMetrics>& runs, const Results& results) {
  std::vector<std::string> clauses, validated;
  const std::vector<std::string> names = names_of(runs);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].validations.empty()) continue;
    validated.push_back(names[i] + " " + rounded(runs[i].validations.back().bits_per_byte, 4));
  }
  if (!validated.empty()) clauses.push_back("Bits per byte of held-out text: " + listed(validated));
  std::vector<std::string> longest;
  std::int64_t context = 0;
  for (const ContextResult& result : results.contexts) context = std::max(context, result.context);
  for (const ContextResult& result : results.contexts) {
    if (result.context == context) longest.push_back(result.model + " " + rounded(result.perplexity, 4));
  }
  if (!longest.empty()) {
    clauses.push_back("perplexity with " + grouped(context) + " tokens of context: " + listed(longest));
  }
  for (const auto& stream : by_model(results.streams)) {
    const StreamResult &first = stream.front(), &last = stream.back();
    if (first.position == last.position) continue;
    clauses.push_back(
        last.model + " reads on to token " + grouped(last.position) + " with memory " +
        percent(static_cast<double>(last.resident_bytes) / static_cast<double>(first.resident_bytes) - 1) +
        " and time per token " + percent(last.seconds_per_token / first.seconds_per_token - 1) +
        " since token " + grouped(first.position));
  }
  std::string lead;
  for (const std::string& clause : clauses) lead += (lead.empty() ? "" : "; ") + clause;
  return lead.empty() ? "There are no results yet." : lead + ".";
}

std::string loss_chart(const std::vector<RunMetrics>& runs, Against against, std::string title,
                       std::string x_label, bool validation) {
  LineChart chart{std::move(title),
                  std::move(x_label),
                  "loss, nats a token (log scale)",
                  {},
                  Scale::logarithmic,
                  false,
                  {},
                  {}};
  const std::vector<std::string> names = names_of(runs);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (validation) {
      chart.series.push_back(validation_curve(runs[i], against, names[i]));
    } else {
      chart.series.push_back(training_curve(runs[i], against, &TrainingStep::loss, names[i]));
      chart.series.back().smoothing = 0.8;
    }
  }
  return draw(chart);
}

void add_runs(Page& page, const std::vector<RunMetrics>& runs) {
  if (runs.empty()) return;
  page.section("Training");
  page.charts({loss_chart(runs, Against::tokens, "Validation loss by tokens", "tokens", true),
               loss_chart(runs, Against::seconds, "Validation loss by time", "seconds of training", true),
               loss_chart(runs, Against::tokens, "Training loss by tokens", "tokens", false),
               loss_chart(runs, Against::seconds, "Training loss by time", "seconds of training", false)});
  Table table{{"run", "parameters", "tokens", "training loss", "validation loss", "perplexity",
               "bits per byte", "seconds", "tokens a second"},
              {}};
  const std::vector<std::string> names = names_of(runs);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const RunMetrics& run = runs[i];
    const bool stepped = !run.steps.empty(), validated = !run.validations.empty();
    const double tokens = stepped ? static_cast<double>(run.steps.back().tokens) : kNone;
    const double seconds = stepped ? run.steps.back().seconds : kNone;
    const Validation none{0, 0, kNone, kNone, kNone, kNone};
    const Validation& validation = validated ? run.validations.back() : none;
    table.rows.push_back({names[i], run.parameters > 0 ? grouped(run.parameters) : "–",
                          stepped ? grouped(run.steps.back().tokens) : "–",
                          rounded(final_training_loss(run), 4), rounded(validation.loss, 4),
                          rounded(validation.perplexity, 4), rounded(validation.bits_per_byte, 4),
                          rounded(seconds, 3), rounded(tokens / seconds, 4)});
  }
  page.table(table);
}

double bits_of(const ContextResult& result) {
  return result.bits_per_byte;
}
double perplexity_of(const ContextResult& result) {
  return result.perplexity;
}

// One row a length of context, one column a model.
Table context_table(const Results& results, const std::set<std::int64_t>& lengths) {
  Table table{{"context"}, {}};
  for (const std::int64_t length : lengths) table.rows.push_back({grouped(length)});
  for (const auto& [what, value_of] :
       {std::pair("perplexity", &perplexity_of), {"bits per byte", &bits_of}}) {
    for (const auto& group : by_model(results.contexts)) {
      table.columns.push_back(group.front().model + ", " + what);
      std::map<std::int64_t, double> values;
      for (const ContextResult& result : group) values[result.context] = value_of(result);
      std::size_t row = 0;
      for (const std::int64_t length : lengths) {
        table.rows[row++].push_back(values.contains(length) ? rounded(values[length], 4) : "–");
      }
    }
  }
  return table;
}

std::string context_chart(const Results& results, const std::set<std::int64_t>& lengths, std::string title,
                          double (*value_of)(const ContextResult&)) {
  LineChart chart{
      std::move(title), "tokens of context", "lower is better", Scale::logarithmic, {}, false, {}, {}};
  for (const std::int64_t length : lengths) chart.x_ticks.push_back(static_cast<double>(length));
  for (const auto& group : by_model(results.contexts)) {
    Series series{group.front().model, {}, {}, {}, {}, 0};
    for (const ContextResult& result : group) {
      series.x.push_back(static_cast<double>(result.context));
      series.y.push_back(value_of(result));
    }
    chart.series.push_back(std::move(series));
  }
  return draw(chart);
}

void add_contexts(Page& page, const Results& results) {
  if (results.contexts.empty()) return;
  page.section("Perplexity by length of context");
  std::set<std::int64_t> lengths, scored;
  for (const ContextResult& result : results.contexts) {
    lengths.insert(result.context);
    scored.insert(result.tokens);
  }
  page.charts({context_chart(results, lengths, "Perplexity", &perplexity_of),
               context_chart(results, lengths, "Bits per byte", &bits_of)});
  page.paragraph(scored.size() == 1 ? "Each figure is over " + grouped(*scored.begin()) + " predicted tokens."
                                    : "Each figure is over between " + grouped(*scored.begin()) + " and " +
                                          grouped(*scored.rbegin()) + " predicted tokens.");
  page.table(context_table(results, lengths));
}

void add_streams(Page& page, const Results& results) {
  if (results.streams.empty()) return;
  page.section("Streaming one document");
  LineChart memory{"Memory", "position in the document, tokens", "resident memory, MB", {}, {}, true, {}, {}};
  LineChart time{"Time per token", "position in the document, tokens", "milliseconds", {}, {}, true, {}, {}};
  Table table{{"model", "from token", "to token", "memory at first", "memory at last", "memory, change",
               "time per token, median", "time per token, change"},
              {}};
  for (const auto& group : by_model(results.streams)) {
    Series by_memory{group.front().model, {}, {}, {}, {}, 0}, by_time = by_memory;
    for (const StreamResult& result : group) {
      by_memory.x.push_back(static_cast<double>(result.position));
      by_memory.y.push_back(static_cast<double>(result.resident_bytes) / 1e6);
      by_time.x.push_back(static_cast<double>(result.position));
      by_time.y.push_back(result.seconds_per_token * 1e3);
    }
    const StreamResult &first = group.front(), &last = group.back();
    const double begin = static_cast<double>(first.resident_bytes),
                 end = static_cast<double>(last.resident_bytes);
    table.rows.push_back({first.model, grouped(first.position), grouped(last.position), human_bytes(begin),
                          human_bytes(end), percent(end / begin - 1), rounded(median(by_time.y), 3) + " ms",
                          percent(last.seconds_per_token / first.seconds_per_token - 1)});
    memory.series.push_back(downsampled(by_memory, 1000));
    time.series.push_back(downsampled(by_time, 1000));
  }
  page.charts({draw(memory), draw(time)});
  page.table(table);
}

}  // namespace

std::string comparison_html(std::string_view title, const std::vector<std::string>& notes,
                            const std::vector<RunMetrics>& runs, const Results& results) {
  Page page(title, lead_sentence(runs, results));
  std::vector<KeyFigure> figures;
  const std::vector<std::string> names = names_of(runs);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].validations.empty()) continue;
    figures.push_back({rounded(runs[i].validations.back().bits_per_byte, 4), names[i] + ", bits per byte"});
  }
  for (const auto& stream : by_model(results.streams)) {
    figures.push_back({grouped(stream.back().position), stream.back().model + ", tokens streamed"});
    figures.push_back({human_bytes(static_cast<double>(stream.back().resident_bytes)),
                       stream.back().model + ", memory at the end"});
  }
  if (!figures.empty()) page.key_figures(figures);
  add_runs(page, runs);
  add_contexts(page, results);
  add_streams(page, results);
  if (!notes.empty()) page.section("Notes");
  for (const std::string& note : notes) page.paragraph(note);
  return page.html();
}

void write_comparison_report(const std::filesystem::path& path, const Comparison& comparison) {
  std::vector<RunMetrics> runs;
  runs.reserve(comparison.runs.size());
  for (const auto& folder : comparison.runs) runs.push_back(read_metrics(folder));
  write_file_atomically(
      path, comparison_html(comparison.title, comparison.notes, runs, read_results(comparison.results)));
}

}  // namespace megalodon::report
