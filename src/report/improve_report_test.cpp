#include "report/improve_report.h"

#include <gtest/gtest.h>

#include "base/file.h"
#include "base/testing.h"
#include "report/testing.h"

namespace megalodon::report {
namespace {

using megalodon::testing::contains;
using megalodon::testing::TemporaryFolder;
using testing::count_of;
using testing::xml_fault;

constexpr const char* kMetrics =
    R"({"kind":"start","step":0,"time":"2026-11-25 10:00","task":"reverse","base":8,"rounds":2,"models":3,"parameters":125000,"model":"llama","device":"cpu","compute_type":"bfloat16"}
{"kind":"step","round":0,"step":1,"tokens":900,"loss":2.5,"learning_rate":0.001,"gradient_norm":1.5,"seconds":0.02}
{"kind":"step","round":0,"step":2,"tokens":900,"loss":0.5,"learning_rate":0.001,"gradient_norm":1.5,"seconds":0.02}
{"kind":"evaluation","round":0,"step":2,"difficulty":"2","problems":64,"mean_accuracy":1,"accuracy":[1,1,1],"training_may_have_seen_these":true}
{"kind":"evaluation","round":0,"step":2,"difficulty":"8","problems":64,"mean_accuracy":0.995,"accuracy":[1,0.99,0.995]}
{"kind":"evaluation","round":0,"step":2,"difficulty":"9","problems":64,"mean_accuracy":0.625,"accuracy":[0.5,0.625,0.75]}
{"kind":"round","round":0,"step":2,"solved":"8","seconds":{"train":60,"evaluate":2}}
{"kind":"labels","round":1,"step":2,"generated":4000,"kept":3000,"unended":7,"accuracy_before":0.75,"accuracy_after":0.99,"filters":[{"filter":"vote","left":3000}]}
{"kind":"evaluation","round":1,"step":4,"difficulty":"2","problems":64,"mean_accuracy":1,"accuracy":[1,1,1],"training_may_have_seen_these":true}
{"kind":"evaluation","round":1,"step":4,"difficulty":"9","problems":64,"mean_accuracy":1,"accuracy":[1,1,1]}
{"kind":"round","round":1,"step":4,"solved":"9","seconds":{"train":30,"generate":3}}
not a line
{"kind":"resume","step":4,"task":"reverse","base":8,"rounds":2,"models":3,"parameters":125000}
{"kind":"st)";

TEST(ImproveReport, ReadsWhatARunWrote) {
  const auto run = parse_improve_metrics(kMetrics);
  EXPECT_EQ(run.task, "reverse");
  EXPECT_EQ(run.base, 8);
  EXPECT_EQ(run.losses, (std::vector<double>{2.5, 0.5}));
  EXPECT_EQ(run.difficulties, (std::vector<std::string>{"2", "8", "9"}));
  EXPECT_EQ(run.inseparable, (std::set<std::string>{"2"}));
  EXPECT_EQ(run.evaluations.at(0).accuracy.at("9"), 0.625);
  EXPECT_EQ(run.evaluations.at(1).solved, "9");
  EXPECT_EQ(run.evaluations.at(1).seconds.at("generate"), 3);
  EXPECT_EQ(run.labels.at(1).kept, 3000);
  EXPECT_EQ(run.labels.at(1).left, (std::vector<std::pair<std::string, std::int64_t>>{{"vote", 3000}}));
  EXPECT_EQ(run.resumes, 1);
  EXPECT_EQ(run.unreadable_lines, 1) << "the torn last line is not counted";
}

TEST(ImproveReport, LeadsWithTheClimbAndShowsHowItCame) {
  const auto html = improve_report_html(parse_improve_metrics(kMetrics), "rounds = 2 # <two>\n");
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_TRUE(contains(html, "solved after round 0: 8; after round 1: 9."));
  EXPECT_TRUE(contains(html, "Of difficulty 2 there are too few problems to keep some apart"));
  EXPECT_TRUE(contains(html, "vote 3,000"));
  EXPECT_TRUE(contains(html, "75.00 %"));
  EXPECT_TRUE(contains(html, "99.00 %"));
  EXPECT_TRUE(contains(html, "rounds = 2 # &lt;two&gt;"));
  EXPECT_EQ(count_of(html, "<svg"), 5u) << "heat map, hardest solved, true labels, loss, learning rate";
}

TEST(ImproveReport, MarksThePlaceOfTheFirstWrongCharacter) {
  auto run = parse_improve_metrics(kMetrics);
  parse_wrong_answers(
      R"({"difficulty":"4","wrong":[{"model":2,"prompt":"1234=","target":"4321","answer":"4371","ended":false,"first_wrong":2}]}
{"difficulty":"5","wrong":[]}
{"difficulty":"6","wrong":[{"model":0,"prompt":"1=","target":"1","answer":"<2","ended":true,"first_wrong":99}]}
[1]
)",
      run);
  ASSERT_EQ(run.wrong.size(), 2u);
  EXPECT_EQ(run.wrong[1].first_wrong, 2) << "a place beyond the answer is its end";
  const auto html = improve_report_html(run, "");
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_TRUE(contains(html, "answer  4371 … (never ended)\n          ^"));
  EXPECT_TRUE(contains(html, "answer  &lt;2\n"));
}

TEST(ImproveReport, TakesARunThatHasHardlyStarted) {
  for (const char* text : {"", "{}\n", "{\"kind\":\"start\",\"step\":0}\n",
                           "{\"kind\":\"round\",\"round\":0,\"step\":0,\"solved\":\"\",\"seconds\":{}}\n"}) {
    EXPECT_EQ(xml_fault(improve_report_html(parse_improve_metrics(text), "")), "") << text;
  }
}

TEST(ImproveReport, IsWrittenFromTheRunDirectory) {
  const TemporaryFolder folder;
  write_file_atomically(folder.path() / "metrics.jsonl", kMetrics);
  std::filesystem::create_directories(folder.path() / "rounds" / "1");
  write_file_atomically(
      folder.path() / "rounds" / "1" / "evaluation.jsonl",
      R"({"difficulty":"9","wrong":[{"model":0,"prompt":"12=","target":"21","answer":"22","ended":true,"first_wrong":1}]})"
      "\n");
  write_improve_report(folder.path());
  EXPECT_TRUE(contains(read_file(folder.path() / "report.html"), "prompt  12="));
}

}  // namespace
}  // namespace megalodon::report
