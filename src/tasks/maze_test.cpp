#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <sstream>

#include "tasks/testing.h"

namespace megalodon::tasks {
namespace {

struct Graph {
  std::string start, end;
  std::vector<std::string> order;
  std::map<std::string, std::set<std::string>> neighbours;
  int listed = 0;  // neighbours as written
};

// Reads a prompt by splitting.
Graph read(std::string prompt) {
  Graph graph;
  EXPECT_EQ(prompt.back(), '=');
  prompt.pop_back();
  std::istringstream text(prompt);
  std::getline(text, graph.start, '>');
  std::getline(text, graph.end, '#');
  for (std::string entry; std::getline(text, entry, '-');) {
    std::istringstream parts(entry);
    std::string node, neighbour;
    std::getline(parts, node, ':');
    graph.order.push_back(node);
    for (; std::getline(parts, neighbour, ','); ++graph.listed) graph.neighbours[node].insert(neighbour);
  }
  return graph;
}

// The paths without revisits, depth first.
void find_paths(const Graph& graph, std::string path, const std::string& node, std::set<std::string> seen,
                std::vector<std::string>& paths) {
  path += (path.empty() ? "" : ">") + node;
  seen.insert(node);
  if (node == graph.end) paths.push_back(path);
  for (const auto& next : graph.neighbours.at(node)) {
    if (!seen.contains(next)) find_paths(graph, path, next, seen, paths);
  }
}

TEST(Maze, IsATreeWithAPathOfTheHops) {
  const Task& task = find_task("maze");
  for (const std::string text : {"9", "1", "29", "1/2", "98/99", "5/99", "9/10"}) {
    const Difficulty d = task.difficulty(text);
    for (std::uint64_t i = 0; i < 100; ++i) {
      const Problem problem = training_problem(task, d, 4, i);
      const Graph graph = read(problem.prompt);
      EXPECT_EQ(static_cast<std::int64_t>(graph.order.size()), d.second);
      EXPECT_EQ(graph.neighbours.size(), graph.order.size());
      EXPECT_EQ(graph.listed, 2 * (d.second - 1));
      for (const auto& [node, neighbours] : graph.neighbours) {
        EXPECT_TRUE(std::stoi(node) >= 1 && std::stoi(node) <= 99 && node[0] != '0') << node;
        for (const auto& next : neighbours) EXPECT_TRUE(graph.neighbours.at(next).contains(node));
      }
      std::vector<std::string> paths;
      find_paths(graph, "", graph.start, {}, paths);
      EXPECT_EQ(paths, std::vector{problem.target});
      EXPECT_EQ(std::ranges::count(problem.target, '>'), d.first);
      EXPECT_EQ(task.solve(problem.prompt), problem.target);
      EXPECT_EQ(task.fields(problem.prompt), (Json{{"nodes", d.second}, {"hops", d.first}}));
    }
  }
}

// The probability that just `count` walks end on one given node of the first path, by the rule: a walk steps
// onto each attached and each unplaced node alike, ends on an attached one, and attaches its start alone.
double walks_end_on(int attached, int unplaced, int count) {
  if (count < 0) return 0;
  if (unplaced == 0) return count == 0;
  double total = 0, here = 1;
  for (--unplaced;; --unplaced) {
    const double stop = here * attached / (attached + unplaced), hit = 1.0 / attached;
    total += stop * (hit * walks_end_on(attached + 1, unplaced, count - 1) +
                     (1 - hit) * walks_end_on(attached + 1, unplaced, count));
    if (unplaced == 0) return total;
    here -= stop;
  }
}

TEST(Maze, GrowsAsTheRuleSays) {
  const Task& task = find_task("maze");
  constexpr int draws = 40000, nodes = 8;
  std::array<int, nodes> degrees{};
  for (std::uint64_t i = 0; i < draws; ++i) {
    Random random(5, Purpose::test, i);
    const Graph graph = read(task.draw({1, nodes}, random).prompt);
    ++degrees.at(graph.neighbours.at(graph.start).size());
  }
  for (int degree = 1; degree < nodes; ++degree) {
    const double expected = draws * walks_end_on(2, nodes - 2, degree - 1);
    EXPECT_NEAR(degrees.at(static_cast<std::size_t>(degree)), expected, 5 * std::sqrt(expected) + 1)
        << degree;
  }
}

TEST(Maze, LabelsAndOrdersAreUniform) {
  const Task& task = find_task("maze");
  constexpr int draws = 20000;
  std::map<std::string, int> starts;
  int start_first = 0;
  for (std::uint64_t i = 0; i < draws; ++i) {
    Random random(6, Purpose::test, i);
    const Graph graph = read(task.draw({2, 5}, random).prompt);
    ++starts[graph.start];
    start_first += graph.order.front() == graph.start;
  }
  EXPECT_EQ(starts.size(), 99u);
  for (const auto& [label, count] : starts) EXPECT_NEAR(count, draws / 99.0, 6 * std::sqrt(draws / 99.0));
  EXPECT_NEAR(start_first, draws / 5.0, 5 * std::sqrt(draws / 5.0));
}

TEST(Maze, NamesWhatIsWrongWithAPrompt) {
  EXPECT_EQ(solve("maze", "5>9#5:7-7:9,5-9:7="), "5>7>9");
  const std::vector<std::pair<std::string, std::string>> cases{
      {"", "a node 1 to 99 is missing at byte 0"},
      {"5", "'>' is missing at byte 1"},
      {"5>9", "'#' is missing at byte 3"},
      {"5>9#", "a node 1 to 99 is missing at byte 4"},
      {"5>9#5", "':' is missing at byte 5"},
      {"5>9#5:", "a node 1 to 99 is missing at byte 6"},
      {"5>9#5:9,", "a node 1 to 99 is missing at byte 8"},
      {"5>9#5:9-9:5", "'=' is missing at byte 11"},
      {"5>9#5:9-9:5=0", "nothing may follow the '='"},
      {"05>9#5:9-9:5=", "a node 1 to 99 is missing at byte 0"},
      {"5>100#5:9-9:5=", "a node 1 to 99 is missing at byte 2"},
      {"-5>9#5:9-9:5=", "a node 1 to 99 is missing at byte 0"},
      {"5>9#5:9-9:5-5:9=", "node 5 is listed twice"},
      {"5>9#5:9,9-9:5=", "node 5 has the neighbour 9 twice"},
      {"5>9#5:5,9-9:5=", "node 5 has the neighbour 5"},
      {"5>9#5:9,7-9:5=", "node 5 has the neighbour 7, but not the other way round"},
      {"5>8#5:9-9:5=", "node 8 is not in the graph"},
      {"5>5#5:9-9:5=", "start and end are the same node"},
      {"5>9#5:9,7-9:5,7-7:5,9=", "the graph has a cycle"},
      {"5>9#5:9-9:5-1:2-2:1=", "the graph is not connected"},
  };
  for (const auto& [prompt, message] : cases) EXPECT_ERROR(solve("maze", prompt), message);
}

TEST(Maze, VerifiesWithoutAnAnswerKey) {
  const Task& task = find_task("maze");
  const std::string prompt = "5>9#5:7,1-7:9,5-9:7-1:5=";
  const auto verify = [&](std::string_view answer, bool steps, bool ends) {
    return task.verify(prompt, answer, steps, ends);
  };
  EXPECT_TRUE(task.has_verifier());
  EXPECT_TRUE(verify("5>7>9", true, true));
  EXPECT_TRUE(verify("5>1>5>7>9", true, true));  // revisits pass
  EXPECT_FALSE(verify("5>9", true, true));       // no such edge
  EXPECT_TRUE(verify("5>9", false, true));
  EXPECT_TRUE(verify("1>5>7", true, false));
  EXPECT_FALSE(verify("1>5>7", true, true));
  EXPECT_FALSE(verify("1>5>7>9", false, true));
  EXPECT_FALSE(verify("33", true, false));
  for (const std::string answer : {"", ">", "5>", "5>7>9>", "5>7>9=", "5 7 9", "5>07>9", "5>700>9"}) {
    EXPECT_FALSE(verify(answer, false, false)) << answer;
  }
  for (std::uint64_t i = 0; i < 100; ++i) {
    const Problem problem = training_problem(task, {9, 30}, 7, i);
    EXPECT_TRUE(task.verify(problem.prompt, problem.target, true, true));
  }
}

TEST(Maze, GrowsInHopsOrNodes) {
  const Task& hops = find_task("maze");
  EXPECT_EQ(hops.difficulty("9"), (Difficulty{9, 30}));
  EXPECT_EQ(hops.difficulty("9/40"), (Difficulty{9, 40}));
  EXPECT_EQ(hops.text({9, 30}), "9");
  EXPECT_EQ(hops.text({9, 40}), "9/40");
  for (const std::string text : {"", "0", "30", "9/", "/40", "9/9", "9/100", "9/40/2", "x"}) {
    EXPECT_ERROR(hops.difficulty(text), "use the hops");
  }
  EXPECT_EQ(hops.base_weight(9), 1);
  EXPECT_EQ(texts(hops, hops.base_grid(3)), (Texts{"1", "2", "3"}));
  EXPECT_EQ(texts(hops, hops.rung(9, 1)), Texts{"10"});
  EXPECT_EQ(texts(hops, hops.rung(9, 20)), Texts{"29"});
  EXPECT_ERROR(hops.rung(9, 21), "use rounds from 1 to");
  EXPECT_EQ(hops.longest_answer({9, 30}), 19);

  const Task& nodes = find_task("maze_nodes");
  EXPECT_EQ(nodes.row_name(), "maze");
  EXPECT_EQ(nodes.difficulty("40"), (Difficulty{9, 40}));
  EXPECT_EQ(nodes.text({9, 40}), "40");
  for (const std::string text : {"", "9", "100", "9/40"})
    EXPECT_ERROR(nodes.difficulty(text), "use the nodes");
  EXPECT_EQ(nodes.base_weight(30), 21);
  EXPECT_EQ(texts(nodes, nodes.base_grid(30)), (Texts{"10", "13", "16", "19", "22", "25", "28"}));
  EXPECT_EQ(texts(nodes, nodes.rung(30, 1)), (Texts{"31", "32", "33"}));
  EXPECT_EQ(texts(nodes, nodes.rung(30, 23)), (Texts{"97", "98", "99"}));
  EXPECT_ERROR(nodes.rung(30, 24), "use rounds from 1 to");
  EXPECT_ERROR(nodes.rung(9, 1), "use 10 to 99");
}

}  // namespace
}  // namespace megalodon::tasks
