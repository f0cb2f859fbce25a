#include "report/run_report.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>

#include "base/file.h"
#include "base/testing.h"
#include "report/testing.h"

namespace megalodon::report {
namespace {

using megalodon::testing::contains;
using megalodon::testing::TemporaryFolder;
using testing::count_of;
using testing::xml_fault;

RunMetrics run_of(std::int64_t steps, std::string model) {
  RunMetrics run;
  run.name = "folder-" + model;
  run.model = std::move(model);
  run.parameters = 1'234'567;
  for (std::int64_t step = 1; step <= steps; ++step) {
    const double loss = 2 + 3 / std::sqrt(static_cast<double>(step));
    run.steps.push_back({step, step * 4096, loss, 1e-3, 0.7, 0.5 * static_cast<double>(step), 8192, false});
  }
  if (steps > 0)
    run.validations.push_back({steps, steps * 4096, 2.25, 9.4877, 3.2461, 0.5 * static_cast<double>(steps)});
  return run;
}

TEST(RunReport, LeadsWithTheResult) {
  const std::string html = run_report_html(run_of(200, "megalodon"), "[model]\nlayers = 6 # <six>\n");
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_TRUE(contains(html, "validation loss 2.250, which is perplexity 9.488 or 3.246 bits per byte."));
  EXPECT_TRUE(contains(html, "1,234,567"));
  EXPECT_TRUE(contains(html, "layers = 6 # &lt;six&gt;"));
  EXPECT_TRUE(contains(html, "No step was skipped"));
  EXPECT_EQ(count_of(html, "<svg"), 5u);
}

TEST(RunReport, ShowsSkippedSteps) {
  RunMetrics run = run_of(50, "llama");
  run.steps[10].skipped = true;
  run.steps[10].loss = std::nan("");
  const std::string html = run_report_html(run, "");
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_TRUE(contains(html, "Steps skipped so far"));
  EXPECT_EQ(count_of(html, "No step was skipped"), 0u);
  EXPECT_EQ(count_of(html, "Configuration"), 0u);
}

TEST(RunReport, TakesARunThatHasHardlyStarted) {
  for (const std::int64_t steps : {0, 1, 2}) {
    RunMetrics run = run_of(steps, "megalodon");
    run.validations.clear();
    EXPECT_EQ(xml_fault(run_report_html(run, "")), "") << steps;
  }
  EXPECT_TRUE(contains(run_report_html(run_of(0, "megalodon"), ""), "has not finished a step yet"));
}

TEST(RunReport, StaysSmallForLongRuns) {
  const std::string html = run_report_html(run_of(100'000, "megalodon"), "");
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_LT(html.size(), 600'000u);
}

TEST(RunReport, IsWrittenBesideTheMetrics) {
  TemporaryFolder folder;
  megalodon::testing::write_text(
      folder / "metrics.jsonl",
      R"({"kind":"step","step":1,"tokens":10,"loss":4,"learning_rate":1,"gradient_norm":1,"seconds":1,"tokens_per_second":10})"
      "\n{\"kind\":\"st");
  write_run_report(folder.path());
  EXPECT_TRUE(contains(read_file(folder / "report.html"), "training loss 4.000, not validated yet"));
  megalodon::testing::write_text(folder / "config.toml", "seed = 7\n");
  write_run_report(folder.path());
  EXPECT_TRUE(contains(read_file(folder / "report.html"), "seed = 7"));
}

TEST(FinalTrainingLoss, IsTheMeanOfTheLastFiniteSteps) {
  RunMetrics run = run_of(100, "megalodon");
  run.steps[98].loss = 3;
  run.steps[99].loss = std::nan("");
  EXPECT_DOUBLE_EQ(final_training_loss(run), 3);
  EXPECT_TRUE(std::isnan(final_training_loss(RunMetrics{})));
}

TEST(Comparison, ShowsRunsContextsAndStreams) {
  Results results;
  for (const char* model : {"megalodon", "llama"}) {
    for (const std::int64_t context : {512, 4096})
      results.contexts.push_back({model, context, 1000, 1.5, 4.5, 2.1, 3});
  }
  results.streams = {{"megalodon", 1000, 200'000'000, 0.001}, {"megalodon", 1'000'000, 202'000'000, 0.00099}};
  const std::string html = comparison_html("Two <models>", {"Text: a book. Licence: public domain."},
                                           {run_of(100, "megalodon"), run_of(100, "llama")}, results);
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_EQ(count_of(html, "<svg"), 8u);
  EXPECT_TRUE(contains(html, "Bits per byte of held-out text: megalodon 3.246 and llama 3.246"));
  EXPECT_TRUE(contains(html, "memory +1.0% and time per token −1.0% since token 1,000."));
  EXPECT_TRUE(contains(html, "Licence: public domain."));
  EXPECT_TRUE(contains(html, ">4,096<"));
}

TEST(Comparison, TellsRunsOfOneModelApartByFolder) {
  RunMetrics a = run_of(10, "megalodon"), b = run_of(10, "megalodon");
  a.name = "first";
  b.name = "second";
  EXPECT_TRUE(contains(comparison_html("t", {}, {a, b}, {}), "first 3.246 and second 3.246"));
}

TEST(Comparison, SaysNoChangeThatItCannotCompute) {
  Results results;
  results.streams = {{"megalodon", 1, 0, 0}, {"megalodon", 2, 5, 0}};
  EXPECT_TRUE(
      contains(comparison_html("t", {}, {}, results), "with memory – and time per token – since token 1."));
}

TEST(Comparison, LeavesOutWhatIsNotThere) {
  const std::string html = comparison_html("t", {}, {}, {});
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_EQ(count_of(html, "<svg"), 0u);
  EXPECT_TRUE(contains(html, "There are no results yet."));
}

}  // namespace
}  // namespace megalodon::report
