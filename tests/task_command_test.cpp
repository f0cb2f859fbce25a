#include <algorithm>
#include <set>
#include <sstream>

#include "base/json.h"
#include "program.h"

// The command `task`, good input and bad.
namespace megalodon::testing {
namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// The lines that the program prints; it must succeed and say nothing else.
std::vector<std::string> output(const TemporaryFolder& folder, const std::vector<std::string>& arguments,
                                const std::string& input = "") {
  const auto outcome = run(folder, arguments, input);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  return lines_of(outcome.out);
}

TEST(TaskCommand, SamplesOfEveryTaskAreSolvedAndPass) {
  const TemporaryFolder folder;
  const std::vector<std::pair<std::string, std::string>> cases{
      {"reverse_add", "16"},   {"reverse_add", "3+200"}, {"forward_add", "12"}, {"forward_add_padded", "12"},
      {"copy", "20"},          {"reverse", "20"},        {"maze", "9"},         {"maze", "20/60"},
      {"multiply_cot", "3x5"}, {"maze_nodes", "40"}};
  for (const auto& [task, difficulty] : cases) {
    SCOPED_TRACE(::testing::Message() << task << " " << difficulty);
    const std::vector<std::string> sample{"task", "sample", "--task", task,           "--count",
                                          "50",   "--seed", "3",      "--difficulty", difficulty};
    const auto rows = output(folder, sample);
    ASSERT_EQ(rows.size(), 50u);
    std::string text, prompts, targets;
    for (const auto& row : rows) {
      const Json object = Json::parse(row);
      prompts += object["prompt"].get<std::string>() + "\n";
      targets += object["target"].get<std::string>() + "\n";
      text += row + "\n";
    }
    auto bare = sample;
    bare.push_back("--prompts");
    EXPECT_EQ(output(folder, bare), lines_of(prompts));
    EXPECT_EQ(output(folder, {"task", "solve", "--task", task}, prompts), lines_of(targets));
    EXPECT_EQ(output(folder, {"task", "check", "-"}, text),
              std::vector<std::string>{"-: 50 rows, all right"});
  }
}

TEST(TaskCommand, SamplesByIndex) {
  const TemporaryFolder folder;
  const auto sample = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments{"task", "sample", "--task", "forward_add"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return output(folder, arguments);
  };
  const auto whole = sample({"--base", "10", "--count", "30"});
  EXPECT_EQ(sample({"--base", "10", "--count", "10", "--start", "20"}),
            std::vector(whole.begin() + 20, whole.end()));
  EXPECT_NE(sample({"--base", "10", "--count", "30", "--seed", "2"}), whole);
  for (const auto& row : sample({"--base", "10", "--equal-share", "1", "--count", "100"})) {
    const Json object = Json::parse(row);
    EXPECT_EQ(object["a"].get<std::string>().size(), object["b"].get<std::string>().size());
  }
  const auto training = sample({"--difficulty", "2", "--count", "5000"});
  const std::set<std::string> trained(training.begin(), training.end());
  for (const auto& row : sample({"--difficulty", "2", "--count", "500", "--split", "evaluation"})) {
    EXPECT_FALSE(trained.contains(row)) << row;
  }
  const auto small = run(folder, {"task", "sample", "--task", "copy", "--difficulty", "2", "--count", "1",
                                  "--split", "evaluation"});
  EXPECT_EQ(small.exit_code, 0);
  EXPECT_TRUE(contains(small.err, "too few problems"));
}

TEST(TaskCommand, SolvesTheOthersWhereAPromptIsMalformed) {
  const TemporaryFolder folder;
  const auto outcome =
      run(folder, {"task", "solve", "--task", "forward_add"}, "1+2=\nx\n9+9=\n\n10+5=\r\n7+7");
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.out, "3\n18\n15\n");
  const auto errors = lines_of(outcome.err);
  ASSERT_EQ(errors.size(), 3u) << outcome.err;
  EXPECT_TRUE(errors[0].starts_with("error: line 2: "));
  EXPECT_TRUE(errors[1].starts_with("error: line 4: empty prompt"));
  EXPECT_TRUE(errors[2].starts_with("error: line 6: the prompt does not end with '='"));
  const auto rows = output(folder, {"task", "solve", "--task", "copy", "--json"}, "12=\n");
  EXPECT_EQ(Json::parse(rows.at(0)),
            Json::parse(R"({"task": "copy", "a": "12", "b": null, "prompt": "12=", "target": "12"})"));
}

TEST(TaskCommand, CheckNamesTheRowsThatDiffer) {
  const TemporaryFolder folder;
  const auto path = (folder / "rows.jsonl").string();
  write_text(
      path,
      "{\"task\": \"forward_add\", \"a\": \"1\", \"b\": \"2\", \"prompt\": \"1+2=\", \"target\": \"3\"}\n"
      "{\"task\": \"forward_add\", \"a\": \"1\", \"b\": \"2\", \"prompt\": \"1+2=\", \"target\": \"4\"}\n"
      "not json\n"
      "{\"task\": \"maze\", \"nodes\": 4, \"hops\": 2, \"prompt\": \"5>9#5:7-7:9,5-9:7=\","
      " \"target\": \"5>7>9\"}\n");
  const auto outcome = run(folder, {"task", "check", path});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(lines_of(outcome.out), (std::vector<std::string>{path + ":2: target: expected \"3\", got \"4\"",
                                                             path + ":4: nodes: expected 3, got 4",
                                                             path + ": 4 rows, 2 differ, 1 malformed"}));
  const auto errors = lines_of(outcome.err);
  ASSERT_EQ(errors.size(), 1u) << outcome.err;
  EXPECT_TRUE(contains(errors[0], path + ":3"));

  const auto objects = lines_of(run(folder, {"task", "check", path, "--json"}).out);
  ASSERT_EQ(objects.size(), 4u);
  EXPECT_EQ(
      Json::parse(objects[0]),
      (Json{{"file", path}, {"line", 2}, {"member", "target"}, {"expected", "\"3\""}, {"got", "\"4\""}}));
  EXPECT_EQ(Json::parse(objects[1])["line"], 3);
  EXPECT_EQ(Json::parse(objects[3]), (Json{{"file", path}, {"rows", 4}, {"differing", 2}, {"malformed", 1}}));
}

TEST(TaskCommand, RefusesBadRequests) {
  const TemporaryFolder f;
  expect_refusal(f, {"task"}, 2, {"subcommand"});
  expect_refusal(f, {"task", "sample"}, 2, {"--task"});
  expect_refusal(f, {"task", "sample", "--task", "copy"}, 2, {"--difficulty", "--base"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--base", "3", "--difficulty", "3"}, 2, {"--base"});
  expect_refusal(f, {"task", "sample", "--task", "add", "--difficulty", "3"}, 2, {"'add'", "reverse_add"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--difficulty", "0"}, 2, {"'0'", "1 to 1000"});
  expect_refusal(f, {"task", "sample", "--task", "maze", "--difficulty", "30"}, 2, {"'30'", "1 to 29"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--base", "0"}, 2, {"base", "1 to 1000"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--base", "3", "--count", "-1"}, 2, {"--count"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--base", "3", "--equal-share", "0.5"}, 2,
                 {"no two operands"});
  expect_refusal(f, {"task", "sample", "--task", "forward_add", "--difficulty", "3", "--equal-share", "1"}, 2,
                 {"--equal-share", "--base"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--base", "3", "--split", "evaluation"}, 2,
                 {"--split"});
  expect_refusal(f, {"task", "sample", "--task", "copy", "--base", "3", "--split", "test"}, 2, {"--split"});
  expect_refusal(f, {"task", "solve", "--task", "add"}, 2, {"'add'"});
  expect_refusal(f, {"task", "check", (f / "nowhere").string()}, 2, {"nowhere"});
  expect_refusal(f, {"task", "check", f.path().string()}, 2, {f.path().string()});
  write_text(f / "empty", "");
  expect_refusal(f, {"task", "check", (f / "empty").string()}, 2, {"no rows"});
}

}  // namespace
}  // namespace megalodon::testing
