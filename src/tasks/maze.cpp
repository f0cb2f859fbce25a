#include <algorithm>
#include <array>
#include <bitset>
#include <charconv>
#include <numeric>

#include "tasks/all_tasks.h"
#include "tasks/digits.h"

// Finding the path through a tree: "5>9#5:7-7:9,5-9:7=" -> "5>7>9". Grows in hops or in nodes.
namespace megalodon::tasks {
namespace {

constexpr int kLabels = 99;  // nodes are called 1 .. 99
constexpr std::int64_t kUsualNodes = 30, kUsualHops = 9;
constexpr std::string_view kFormat = "write start>end#node:neighbour,...-node:...= with nodes 1 to 99";

void append_number(int number, std::string& text) {
  std::array<char, 4> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
  text.append(digits.data(), end);
}

// Path or answer: "5>7>9".
std::string path_text(const std::vector<int>& path) {
  std::string text;
  for (const int node : path) {
    if (!text.empty()) text += '>';
    append_number(node, text);
  }
  return text;
}

// Reads numbers 1 .. 99 and single characters off the front of a text.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}
  bool done() const { return position_ == text_.size(); }
  std::size_t position() const { return position_; }
  bool take(char c) {
    const bool found = !done() && text_[position_] == c;
    position_ += found;
    return found;
  }
  // 0 where no number without leading zero is next.
  int number() {
    int value = 0;
    const auto* begin = text_.data() + position_;
    const auto* end = begin + std::min<std::size_t>(3, text_.size() - position_);
    const auto result = std::from_chars(begin, end, value);
    if (result.ec != std::errc() || *begin == '0' || *begin == '-' || value > kLabels) return 0;
    position_ += static_cast<std::size_t>(result.ptr - begin);
    return value;
  }

 private:
  std::string_view text_;
  std::size_t position_ = 0;
};

struct Maze {
  int start = 0, end = 0;
  std::vector<int> nodes;  // in the order of the prompt
  std::array<std::vector<int>, kLabels + 1> neighbours;
  std::array<std::bitset<kLabels + 1>, kLabels + 1> joined;

  bool has(int node) const { return !neighbours[static_cast<std::size_t>(node)].empty(); }
  bool has_edge(int a, int b) const {
    return joined[static_cast<std::size_t>(a)][static_cast<std::size_t>(b)];
  }
};

// Reads a prompt; request errors say what is wrong. `parse` checks the writing, `check` the graph.
class Parser {
 public:
  explicit Parser(std::string_view prompt) : prompt_(prompt), reader_(prompt) {}

  Maze parse() {
    maze_.start = number();
    expect('>');
    maze_.end = number();
    expect('#');
    do {
      parse_node();
    } while (reader_.take('-'));
    expect('=');
    if (!reader_.done()) fail_here("nothing may follow the '='");
    check();
    return std::move(maze_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { fail_prompt(what, prompt_, kFormat); }
  [[noreturn]] void fail_here(const std::string& what) const {
    fail(what + " at byte " + std::to_string(reader_.position()));
  }
  int number() {
    const int value = reader_.number();
    if (value == 0) fail_here("a node 1 to 99 is missing");
    return value;
  }
  void expect(char c) {
    if (!reader_.take(c)) fail_here(std::string("'") + c + "' is missing");
  }
  void parse_node() {
    const int node = number();
    auto& neighbours = maze_.neighbours[static_cast<std::size_t>(node)];
    if (!neighbours.empty()) fail("node " + std::to_string(node) + " is listed twice");
    expect(':');
    do {
      const int neighbour = number();
      auto joined = maze_.joined[static_cast<std::size_t>(node)][static_cast<std::size_t>(neighbour)];
      if (neighbour == node || joined) {
        fail("node " + std::to_string(node) + " has the neighbour " + std::to_string(neighbour) +
             (joined ? " twice" : ""));
      }
      joined = true;
      neighbours.push_back(neighbour);
    } while (reader_.take(','));
    maze_.nodes.push_back(node);
  }
  void check() const {
    for (const int end : {maze_.start, maze_.end}) {
      if (!maze_.has(end)) fail("node " + std::to_string(end) + " is not in the graph");
    }
    if (maze_.start == maze_.end) fail("start and end are the same node");
    for (const int node : maze_.nodes) {
      for (const int neighbour : maze_.neighbours[static_cast<std::size_t>(node)]) {
        if (maze_.has_edge(neighbour, node)) continue;
        fail("node " + std::to_string(node) + " has the neighbour " + std::to_string(neighbour) +
             ", but not the other way round");
      }
    }
  }

  std::string_view prompt_;
  Reader reader_;
  Maze maze_;
};

// The only path from start to end; a request error where the graph is no tree.
std::vector<int> find_path(const Maze& maze, std::string_view prompt) {
  // Walks the tree from the end, so that following `towards` from the start leads there.
  std::array<int, kLabels + 1> towards{};
  std::vector<int> reached{maze.end};
  for (std::size_t i = 0; i < reached.size(); ++i) {
    const int node = reached[i], from = towards[static_cast<std::size_t>(node)];
    for (const int next : maze.neighbours[static_cast<std::size_t>(node)]) {
      if (next == from) continue;
      if (next == maze.end || towards[static_cast<std::size_t>(next)] != 0) {
        fail_prompt("the graph has a cycle, so the path may not be unique", prompt, "use a tree");
      }
      towards[static_cast<std::size_t>(next)] = node;
      reached.push_back(next);
    }
  }
  if (reached.size() < maze.nodes.size()) {
    fail_prompt("the graph is not connected", prompt, "use a tree");
  }
  std::vector<int> path{maze.start};
  while (path.back() != maze.end) path.push_back(towards[static_cast<std::size_t>(path.back())]);
  return path;
}

// A random tree around the path 0, 1, .., hops, as neighbours of each node. Like Wilson's algorithm, but a
// walk steps only onto nodes that are attached or unplaced, so that it has no loops to erase, and of its
// nodes only the start becomes one that later walks may attach to.
std::vector<std::vector<int>> random_tree(int hops, int nodes, Random& random) {
  std::vector<std::vector<int>> neighbours(static_cast<std::size_t>(nodes));
  const auto join = [&](int a, int b) {
    neighbours[static_cast<std::size_t>(a)].push_back(b);
    neighbours[static_cast<std::size_t>(b)].push_back(a);
  };
  std::vector<int> attached(static_cast<std::size_t>(hops + 1)),
      unplaced(static_cast<std::size_t>(nodes - hops - 1));
  std::iota(attached.begin(), attached.end(), 0);
  std::iota(unplaced.begin(), unplaced.end(), hops + 1);
  for (int node = 0; node < hops; ++node) join(node, node + 1);
  while (!unplaced.empty()) {
    const int start = unplaced.back();
    unplaced.pop_back();
    for (int last = start;;) {
      const auto choice = static_cast<std::size_t>(random.below(attached.size() + unplaced.size()));
      if (choice < attached.size()) {
        join(last, attached[choice]);
        break;
      }
      // Unplaced nodes are alike until their labels are drawn: their order does not matter.
      std::swap(unplaced[choice - attached.size()], unplaced.back());
      join(last, unplaced.back());
      last = unplaced.back();
      unplaced.pop_back();
    }
    attached.push_back(start);
  }
  return neighbours;
}

template <class T>
void shuffle(std::vector<T>& items, std::size_t count, Random& random) {
  for (std::size_t i = 0; i < count; ++i) {
    std::swap(items[i], items[i + static_cast<std::size_t>(random.below(items.size() - i))]);
  }
}

double count_mazes(Difficulty d) {
  double count = 1;  // labels in order, and orders of the nodes: exact for two nodes, too few beyond
  for (std::int64_t i = 0; i < d.second; ++i) {
    count = std::min(1e150, count * static_cast<double>((kLabels - i) * (i + 1)));
  }
  return count;
}

class Mazes final : public Task {
 public:
  enum class Growth { hops, nodes };
  Mazes(std::string_view name, Growth growth) : name_(name), growth_(growth) {}

  std::string_view name() const override { return name_; }
  std::string_view row_name() const override { return "maze"; }
  const std::vector<std::string>& symbols() const override {
    static const auto symbols = [] {
      std::vector<std::string> all;
      for (int label = 1; label <= kLabels; ++label) all.push_back(std::to_string(label));
      for (const char c : std::string_view(">#:,-=")) all.emplace_back(1, c);
      return all;
    }();
    return symbols;
  }

  Difficulty difficulty(std::string_view text) const override {
    if (growth_ == Growth::nodes) {
      const auto nodes = parse_count(text);
      if (nodes && *nodes >= kUsualHops + 1 && *nodes <= kLabels) return {kUsualHops, *nodes};
      fail_difficulty(name_, text, "use the nodes, 10 to 99 (the path has 9 hops)");
    }
    const auto slash = text.find('/');
    const auto hops = parse_count(text.substr(0, slash));
    const auto nodes = slash == text.npos ? kUsualNodes : parse_count(text.substr(slash + 1));
    if (hops && nodes && *hops >= 1 && *nodes <= kLabels && *hops < *nodes) return {*hops, *nodes};
    fail_difficulty(name_, text, "use the hops, 1 to 29, as 9 (of 30 nodes), or hops and nodes as 9/40");
  }
  std::string text(Difficulty d) const override {
    if (growth_ == Growth::nodes) return std::to_string(d.second);
    return std::to_string(d.first) + (d.second == kUsualNodes ? "" : "/" + std::to_string(d.second));
  }
  double problems(Difficulty d) const override { return count_mazes(d); }
  std::int64_t longest_answer(Difficulty d) const override { return 2 * d.first + 1; }

  std::int64_t smallest_base() const override { return growth_ == Growth::hops ? 1 : kUsualHops + 1; }
  std::int64_t largest_base() const override { return growth_ == Growth::hops ? kUsualNodes - 1 : kLabels; }
  Difficulty draw_base(std::int64_t base, double, Random& random) const override {
    const auto levels = static_cast<std::uint64_t>(base - smallest_base() + 1);
    return at(smallest_base() + static_cast<std::int64_t>(random.below(levels)));
  }
  std::vector<Difficulty> base_grid(std::int64_t base) const override {
    std::vector<Difficulty> grid;
    for (std::int64_t level = smallest_base(); level <= base; level += levels_a_round()) {
      grid.push_back(at(level));
    }
    return grid;
  }
  double base_weight(std::int64_t base) const override {
    return growth_ == Growth::hops ? 1 : static_cast<double>(base - smallest_base() + 1);
  }
  std::int64_t last_round(std::int64_t base) const override {
    return (largest_base() - base) / levels_a_round();
  }
  std::vector<Difficulty> rung(std::int64_t base, std::int64_t round) const override {
    check_rung(*this, base, round);
    std::vector<Difficulty> added;
    for (std::int64_t i = 1; i <= levels_a_round(); ++i) {
      added.push_back(at(base + (round - 1) * levels_a_round() + i));
    }
    return added;
  }

  Problem draw(Difficulty d, Random& random) const override {
    const int hops = static_cast<int>(d.first), nodes = static_cast<int>(d.second);
    auto tree = random_tree(hops, nodes, random);
    std::vector<int> labels(kLabels);
    std::iota(labels.begin(), labels.end(), 1);
    shuffle(labels, tree.size(), random);
    const auto label = [&](int node) { return labels[static_cast<std::size_t>(node)]; };

    Problem problem;
    problem.prompt.reserve(12 * tree.size());
    append_number(label(0), problem.prompt);
    append_number(label(hops), problem.prompt += '>');
    std::vector<int> order(tree.size());
    std::iota(order.begin(), order.end(), 0);
    shuffle(order, order.size(), random);
    char before = '#';
    for (const int node : order) {
      append_number(label(node), problem.prompt += before);
      before = ':';
      auto& neighbours = tree[static_cast<std::size_t>(node)];
      shuffle(neighbours, neighbours.size(), random);
      for (const int neighbour : neighbours) {
        append_number(label(neighbour), problem.prompt += before);
        before = ',';
      }
      before = '-';
    }
    problem.prompt += '=';
    labels.resize(static_cast<std::size_t>(hops) + 1);
    problem.target = path_text(labels);
    return problem;
  }
  std::string solve(std::string_view prompt) const override {
    return path_text(find_path(Parser(prompt).parse(), prompt));
  }
  Json fields(std::string_view prompt) const override {
    const Maze maze = Parser(prompt).parse();
    return {{"nodes", maze.nodes.size()}, {"hops", find_path(maze, prompt).size() - 1}};
  }

  bool has_verifier() const override { return true; }
  bool verify(std::string_view prompt, std::string_view answer, bool steps, bool ends) const override {
    const Maze maze = Parser(prompt).parse();
    Reader reader(answer);
    int first = 0, last = 0;
    do {
      const int node = reader.number();
      if (node == 0) return false;
      if (first == 0) first = node;
      if (steps && !(last == 0 ? maze.has(node) : maze.has_edge(last, node))) return false;
      last = node;
    } while (reader.take('>'));
    return reader.done() && (!ends || (first == maze.start && last == maze.end));
  }

 private:
  Difficulty at(std::int64_t level) const {
    return growth_ == Growth::hops ? Difficulty{level, kUsualNodes} : Difficulty{kUsualHops, level};
  }
  std::int64_t levels_a_round() const { return growth_ == Growth::hops ? 1 : 3; }

  std::string_view name_;
  Growth growth_;
};

}  // namespace

const Task& maze() {
  static const Mazes task("maze", Mazes::Growth::hops);
  return task;
}

const Task& maze_nodes() {
  static const Mazes task("maze_nodes", Mazes::Growth::nodes);
  return task;
}

}  // namespace megalodon::tasks
