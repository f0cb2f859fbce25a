#include "report/metrics.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/testing.h"

namespace megalodon::report {
namespace {

using megalodon::testing::contains;
using megalodon::testing::request_error;

std::string step_line(int step, const std::string& loss) {
  return R"({"kind":"step","step":)" + std::to_string(step) + R"(,"tokens":)" + std::to_string(step * 100) +
         R"(,"loss":)" + loss +
         R"(,"learning_rate":0.001,"gradient_norm":1.5,"seconds":2,"tokens_per_second":50})" + "\n";
}

TEST(Metrics, ReadsEveryKind) {
  const RunMetrics run = parse_metrics(
      R"({"kind":"start","step":0,"time":"2026-01-02T03:04:05Z","parameters":1200,"model":"megalodon","device":"cpu","compute_type":"bfloat16","data":"a book"})"
      "\n\n" +
          step_line(1, "5.5") +
          R"({"kind":"step","step":2,"tokens":200,"loss":null,"learning_rate":0.001,"gradient_norm":null,"seconds":4,"tokens_per_second":50,"skipped":true})"
          "\n"
          R"({"kind":"validation","step":2,"tokens":200,"loss":2,"perplexity":7.4,"bits_per_byte":2.9,"seconds":5})"
          "\n"
          R"({"kind":"something new","step":"x"})"
          "\n",
      "metrics.jsonl");
  EXPECT_EQ(run.model, "megalodon");
  EXPECT_EQ(run.parameters, 1200);
  EXPECT_EQ(run.data, "a book");
  EXPECT_EQ(run.started, "2026-01-02T03:04:05Z");
  ASSERT_EQ(run.steps.size(), 2u);
  EXPECT_EQ(run.steps[0].loss, 5.5);
  EXPECT_EQ(run.steps[0].tokens, 100);
  EXPECT_FALSE(run.steps[0].skipped);
  EXPECT_TRUE(std::isnan(run.steps[1].loss));
  EXPECT_TRUE(run.steps[1].skipped);
  ASSERT_EQ(run.validations.size(), 1u);
  EXPECT_EQ(run.validations[0].bits_per_byte, 2.9);
  EXPECT_EQ(run.unreadable_lines, 0);
}

TEST(Metrics, ToleratesALineTornAnywhere) {
  const std::string last = step_line(2, "4.25");
  for (std::size_t length = 0; length < last.size(); ++length) {
    const RunMetrics run = parse_metrics(step_line(1, "5") + last.substr(0, length), "metrics.jsonl");
    // Without its newline alone, the line is whole.
    EXPECT_EQ(run.steps.size(), length == last.size() - 1 ? 2u : 1u) << length;
    EXPECT_EQ(run.unreadable_lines, 0) << length;
  }
}

TEST(Metrics, CountsUnreadableLinesInTheMiddle) {
  const RunMetrics run = parse_metrics(step_line(1, "5") + "{\"kind\":\"st" + step_line(2, "4") +
                                           "[1,2]\n\xff\n" + step_line(3, "\"four\"") + step_line(4, "3"),
                                       "metrics.jsonl");
  EXPECT_EQ(run.steps.size(), 2u);
  EXPECT_EQ(run.unreadable_lines, 4);
}

TEST(Metrics, ForgetsStepsThatAResumedRunDoesAgain) {
  const std::string validation =
      R"({"kind":"validation","step":3,"tokens":300,"loss":9,"perplexity":9,"bits_per_byte":9,"seconds":5})"
      "\n";
  const RunMetrics run =
      parse_metrics(step_line(1, "5") + step_line(2, "4") + step_line(3, "9") + validation +
                        R"({"kind":"resume","step":2,"time":"later","model":"llama"})"
                        "\n" +
                        step_line(3, "3"),
                    "metrics.jsonl");
  ASSERT_EQ(run.steps.size(), 3u);
  EXPECT_EQ(run.steps[2].loss, 3);
  EXPECT_TRUE(run.validations.empty());
  EXPECT_EQ(run.resumes, 1);
  EXPECT_EQ(run.model, "llama");
}

TEST(Metrics, SaysWhereThereIsNothingToRead) {
  EXPECT_TRUE(contains(request_error([] { parse_metrics("", "run/metrics.jsonl"); }),
                       "no training metrics (run/metrics.jsonl)"));
  EXPECT_TRUE(contains(request_error([] { parse_metrics("nonsense\n", "run/metrics.jsonl"); }),
                       "no training metrics"));
  megalodon::testing::TemporaryFolder folder;
  EXPECT_TRUE(contains(request_error([&] { read_metrics(folder.path()); }), "metrics.jsonl"));
}

TEST(Metrics, TakesItsNameFromTheFolder) {
  megalodon::testing::TemporaryFolder folder;
  std::filesystem::create_directory(folder / "small");
  megalodon::testing::write_text(folder / "small/metrics.jsonl", step_line(1, "5"));
  EXPECT_EQ(read_metrics(folder / "small").name, "small");
  EXPECT_EQ(read_metrics(folder / "small/").name, "small");
}

TEST(Results, AreOrderedByModelAndPosition) {
  Results results;
  const auto context = [](const char* model, int length) {
    return std::string(R"({"kind":"ppl","model":")") + model + R"(","context":)" + std::to_string(length) +
           R"(,"loss":1,"perplexity":2.7,"bits_per_byte":1.4,"tokens":50,"seconds":0.5})"
           "\n";
  };
  parse_results(
      context("z", 4096) + context("a", 512) + context("z", 512) +
          R"({"kind":"other"})"
          "\n" +
          R"({"kind":"stream","model":"z","position":9,"seconds_per_token":null,"resident_bytes":5})"
          "\n"
          R"({"kind":"stream","model":"z","position":3,"seconds_per_token":0.1,"resident_bytes":5})",
      "x.jsonl", results);
  ASSERT_EQ(results.contexts.size(), 3u);
  EXPECT_EQ(results.contexts[0].model, "z");
  EXPECT_EQ(results.contexts[0].context, 512);
  EXPECT_EQ(results.contexts[1].context, 4096);
  EXPECT_EQ(results.contexts[2].model, "a");
  ASSERT_EQ(results.streams.size(), 2u);
  EXPECT_EQ(results.streams[0].position, 3);
  EXPECT_TRUE(std::isnan(results.streams[1].seconds_per_token));
}

TEST(Results, NameTheLineThatIsWrong) {
  Results results;
  const std::string good =
      R"({"kind":"stream","model":"z","position":9,"seconds_per_token":1,"resident_bytes":5})"
      "\n";
  EXPECT_TRUE(contains(request_error([&] { parse_results(good + "{", "x.jsonl", results); }), "x.jsonl:2"));
  EXPECT_TRUE(contains(
      request_error([&] { parse_results(R"({"kind":"ppl","model":"m"})", "x.jsonl", results); }), "context"));
}

}  // namespace
}  // namespace megalodon::report
