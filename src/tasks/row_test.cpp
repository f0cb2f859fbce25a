#include "tasks/row.h"

#include "tasks/testing.h"

namespace megalodon::tasks {
namespace {

TEST(Row, IsALineOfJson) {
  EXPECT_EQ(problem_row(find_task("reverse_add"), {"21+43=", "640"}),
            R"({"task":"reverse_add","a":"12","b":"34","prompt":"21+43=","target":"640"})");
  EXPECT_EQ(problem_row(find_task("copy"), {"12=", "12"}),
            R"({"task":"copy","a":"12","b":null,"prompt":"12=","target":"12"})");
  const Json maze = Json::parse(problem_row(find_task("maze_nodes"), {"5>9#5:7-7:9,5-9:7=", "5>7>9"}));
  EXPECT_EQ(maze["task"], "maze");
  EXPECT_EQ(maze["nodes"], 3);
  EXPECT_EQ(maze["hops"], 2);
}

TEST(Row, OwnRowsPass) {
  for (const auto name : task_names()) {
    const Task& task = find_task(name);
    for (std::uint64_t i = 0; i < 100; ++i) {
      const auto row = problem_row(task, base_problem(task, task.smallest_base() + 5, 0, 1, i));
      EXPECT_TRUE(check_row(row, "rows:1").empty()) << row;
    }
  }
}

// Every change of any member of a row is found, or refused as malformed.
TEST(Row, TamperedRowsAreNamed) {
  for (const auto name : task_names()) {
    const Task& task = find_task(name);
    const Json row = Json::parse(problem_row(task, base_problem(task, task.smallest_base() + 5, 0, 1, 3)));
    for (const auto& [member, value] : row.items()) {
      if (member == "task") continue;
      std::vector<Json> others{nullptr, 7, true, Json::array()};
      if (value.is_string()) {
        const auto text = value.get<std::string>();
        for (std::size_t i = 0; i < text.size(); ++i) {
          others.push_back(std::string(text).replace(i, 1, text[i] == '5' ? "6" : "5"));
          others.push_back(std::string(text).erase(i, 1));
          others.push_back(std::string(text).insert(i, "0"));
        }
      }
      for (const Json& other : others) {
        if (other == value) continue;
        Json tampered = row;
        tampered[member] = other;
        bool found = false;
        try {
          found = !check_row(tampered.dump(), "rows:1").empty();
        } catch (const Error& error) {
          found = testing::contains(error.what(), "rows:1");
        }
        EXPECT_TRUE(found) << name << " " << member << " " << other;
      }
    }
  }
}

TEST(Row, DifferencesAreShownWhereTheyAre) {
  auto differences =
      check_row(R"({"task":"forward_add","a":"13","b":"34","prompt":"12+34=","target":"47"})", "rows:1");
  ASSERT_EQ(differences.size(), 2u);
  EXPECT_EQ(differences[0].member, "target");
  EXPECT_EQ(differences[0].expected, "\"46\"");
  EXPECT_EQ(differences[0].got, "\"47\"");
  EXPECT_EQ(differences[1].member, "a");

  const std::string digits = std::string(300, '1');
  Json row{{"task", "copy"}, {"prompt", digits + "="}, {"target", std::string(digits).replace(200, 1, "2")}};
  differences = check_row(row.dump(), "rows:1");
  ASSERT_EQ(differences.size(), 1u);
  EXPECT_EQ(differences[0].expected, "..." + std::string(80, '1') + "...");
  EXPECT_EQ(differences[0].got, "..." + std::string(30, '1') + "2" + std::string(49, '1') + "...");

  row["target"] = digits + "1";  // the ends differ
  differences = check_row(row.dump(), "rows:1");
  ASSERT_EQ(differences.size(), 1u);
  EXPECT_EQ(differences[0].expected, "..." + std::string(30, '1') + "\"");
  EXPECT_EQ(differences[0].got, "..." + std::string(31, '1') + "\"");
}

TEST(Row, NamesWhatIsMalformed) {
  const auto refused = [](std::string_view line, const std::string& message) {
    EXPECT_ERROR(check_row(line, "rows:7"), message);
    EXPECT_ERROR(check_row(line, "rows:7"), "rows:7");
  };
  refused("", "empty");
  refused("{", "malformed JSON");
  refused("[]", "not a JSON object");
  refused(R"({"prompt":"1+1=","target":"2"})", "missing key 'task'");
  refused(R"({"task":"forward_add","target":"2"})", "missing key 'prompt'");
  refused(R"({"task":"forward_add","prompt":"1+1="})", "missing key 'target'");
  refused(R"({"task":"forward_add","prompt":3,"target":"2"})", "wrong value for 'prompt'");
  refused(R"({"task":"add","prompt":"1+1=","target":"2"})", "unknown task 'add'");
  refused(R"({"task":"forward_add","prompt":"1+1","target":"2"})", "does not end with '='");
  refused(R"({"task":"maze","prompt":"1>2#1:3-3:1=","target":"1>2"})", "node 2 is not in the graph");
}

}  // namespace
}  // namespace megalodon::tasks
