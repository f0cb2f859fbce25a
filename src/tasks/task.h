#pragma once
#include <compare>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/random.h"

// The problems of self-improvement (arXiv 2502.01612, section 3): strings in, strings out.
namespace megalodon::tasks {

struct Problem {
  std::string prompt;  // "21+43="
  std::string target;  // "640"
};

// How hard a problem is, as its task reads it: the digits of both operands, the digits of one string (second
// is 0), or the hops and nodes of a maze.
struct Difficulty {
  std::int64_t first = 0, second = 0;
  auto operator<=>(const Difficulty&) const = default;
};

// A task that self-improvement climbs. `base` is the hardest labelled level (digits; digits of each factor;
// hops; nodes); round r = 1, 2, ... adds the difficulties rung(base, r). All const members may be called from
// several threads at once.
class Task {
 public:
  virtual ~Task() = default;

  virtual std::string_view name() const = 0;
  // What rows of its problems are called: both mazes are "maze".
  virtual std::string_view row_name() const { return name(); }
  // The tokens that prompts and targets are made of: characters, and for mazes the numbers 1 .. 99.
  virtual const std::vector<std::string>& symbols() const = 0;

  // "12", "3x5", ...; request errors name the range.
  virtual Difficulty difficulty(std::string_view text) const = 0;
  virtual std::string text(Difficulty difficulty) const = 0;
  // How many different problems there are, roughly where that is beyond a million.
  virtual double problems(Difficulty difficulty) const = 0;
  // Tokens of the longest true answer of a difficulty, without the end token: the bound of decoding follows
  // from the difficulty alone.
  virtual std::int64_t longest_answer(Difficulty difficulty) const = 0;

  // The range of `base`, and where the spec's recipe starts.
  virtual std::int64_t smallest_base() const = 0;
  virtual std::int64_t largest_base() const = 0;
  // The difficulty of one labelled problem. `equal_share`: how many have operands of equal length (tasks of
  // two operands alone; their lengths are independent in the others).
  virtual Difficulty draw_base(std::int64_t base, double equal_share, Random& random) const = 0;
  virtual bool has_two_operands() const { return false; }
  // The labelled difficulties as evaluation shows them, in order.
  virtual std::vector<Difficulty> base_grid(std::int64_t base) const = 0;
  // The weight of the labelled set in a round's mixture.
  virtual double base_weight(std::int64_t base) const = 0;
  // The last round that the hardest problems allow.
  virtual std::int64_t last_round(std::int64_t base) const = 0;
  // What round r adds, 1 <= r <= last_round(base); request errors name the range.
  virtual std::vector<Difficulty> rung(std::int64_t base, std::int64_t round) const = 0;
  // Rungs that each round of accelerated self-improvement takes, where the task fixes it (multiplication);
  // empty where a probe decides.
  virtual std::vector<std::int64_t> accelerated_rungs(std::int64_t) const { return {}; }

  virtual Problem draw(Difficulty difficulty, Random& random) const = 0;
  // The target of a prompt; request errors say what is wrong with it.
  virtual std::string solve(std::string_view prompt) const = 0;
  // What a row of a problem holds besides task, prompt and target: "a" and "b", or "nodes" and "hops".
  virtual Json fields(std::string_view prompt) const = 0;
  // Whether an answer can be judged from the prompt, without an answer key.
  virtual bool has_verifier() const { return false; }
  // Every step of the answer exists (`steps`), and it starts and ends where the prompt says (`ends`).
  virtual bool verify(std::string_view /*prompt*/, std::string_view /*answer*/, bool /*steps*/,
                      bool /*ends*/) const {
    return false;
  }
};

// "reverse_add", "forward_add", "forward_add_padded", "copy", "reverse", "multiply_cot", "maze" (grows in
// hops), "maze_nodes" (grows in nodes). An unknown name is a request error that lists them.
const Task& find_task(std::string_view name);
std::vector<std::string_view> task_names();
// A request error that names the range where `base` is outside the task's.
void check_base(const Task& task, std::int64_t base);

// Problems as functions of (seed, index). Those whose prompt falls in a fixed sixteenth by its hash are kept
// for evaluation and never trained on; a difficulty of too few problems for that is not separable, and its
// evaluation may repeat what was trained on.
bool is_separable(const Task& task, Difficulty difficulty);
Problem training_problem(const Task& task, Difficulty difficulty, std::uint64_t seed, std::uint64_t index);
Problem base_problem(const Task& task, std::int64_t base, double equal_share, std::uint64_t seed,
                     std::uint64_t index);
Problem evaluation_problem(const Task& task, Difficulty difficulty, std::uint64_t seed, std::uint64_t index);

}  // namespace megalodon::tasks
