#include "improve/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/error.h"
#include "base/system.h"
#include "improve/filters.h"

namespace megalodon::improve {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;

Stage read_stage(Config& config, const std::string& name) {
  constexpr std::array<std::string_view, 2> shapes{"cosine", "linear"};
  Stage s;
  s.peak = config.number(name + ".learning_rate", 0, 1e3);
  s.warmup = config.integer(name + ".warmup_steps", 0, kMost, 0);
  s.stable = config.integer(name + ".stable_steps", 0, kMost, 0);
  s.decay = config.integer(name + ".decay_steps", 0, kMost, 0);
  s.floor = config.integer(name + ".floor_steps", 0, kMost, 0);
  s.linear = config.choice(name + ".decay", shapes, "cosine") == "linear";
  s.final_fraction = config.number(name + ".final_fraction", 0, 1, 0.01);
  if (s.steps() == 0) config.fail(name + ".stable_steps", "a round of no steps", "give it steps");
  return s;
}

const tasks::Task& read_task(Config& config) {
  const auto name = config.string("task.name");
  const auto names = tasks::task_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    config.fail("task.name", "unknown task '" + name + "'", "choose one of " + joined(names));
  }
  return tasks::find_task(name);
}

void read_filters(Config& config, ImproveConfig& c) {
  constexpr std::array<std::string_view, 2> checks{"steps", "ends"};
  c.filters = config.strings("improve.filters", {});
  for (const auto& filter : c.filters) {
    if (std::find(kFilters.begin(), kFilters.end(), filter) == kFilters.end()) {
      const auto near = nearest_name(filter, kFilters);
      config.fail("improve.filters", "unknown filter '" + filter + "'",
                  near.empty() ? "choose among " + joined(kFilters) : "did you mean '" + near + "'?");
    }
  }
  const auto uses = [&](std::string_view filter) {
    return std::find(c.filters.begin(), c.filters.end(), filter) != c.filters.end();
  };
  if (uses("vote")) {
    c.vote_share = config.number("vote.share", 0, 1, 0.7);
    if (c.models < 2)
      config.fail("improve.models", "a vote of one model", "train at least two, or drop the filter 'vote'");
  }
  if (uses("length")) c.length_slack = config.integer("length.slack", 1, kMost);
  if (uses("confidence")) c.confidence_share = config.number("confidence.share", 0, 1, 0.5);
  if (uses("verifier")) {
    if (!c.task->has_verifier()) {
      config.fail("improve.filters",
                  "'" + std::string(c.task->name()) + "' cannot be verified without its answers",
                  "the filter 'verifier' is for mazes");
    }
    const auto wanted = config.strings("verifier.check", {"steps", "ends"});
    for (const auto& check : wanted) {
      if (std::find(checks.begin(), checks.end(), check) == checks.end())
        config.fail("verifier.check", "unknown check '" + check + "'", "choose among steps, ends");
    }
    c.verify_steps = std::find(wanted.begin(), wanted.end(), "steps") != wanted.end();
    c.verify_ends = std::find(wanted.begin(), wanted.end(), "ends") != wanted.end();
    if (wanted.empty()) config.fail("verifier.check", "nothing to check", "choose among steps, ends");
  }
}

}  // namespace

double Stage::rate(int64_t step) const {
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  if (step < warmup + stable) return peak;
  const auto done = step - warmup - stable + 1;
  const double progress = done >= decay ? 1 : static_cast<double>(done) / static_cast<double>(decay);
  const double left = linear ? 1 - progress : 0.5 * (1 + std::cos(std::numbers::pi * progress));
  return peak * (final_fraction + (1 - final_fraction) * left);
}

ImproveConfig read_improve_config(Config& config) {
  constexpr std::array<std::string_view, 3> devices{"auto", "cpu", "cuda"};
  constexpr std::array<std::string_view, 3> types{"auto", "float32", "bfloat16"};
  constexpr std::array<std::string_view, 2> when_empty{"continue", "stop"};
  ImproveConfig c;
  c.run = config.string("run");
  c.seed = static_cast<uint64_t>(config.integer("seed", 0, std::numeric_limits<int32_t>::max(), 1));
  c.device = config.choice("device", devices, "auto");
  c.deterministic = config.boolean("deterministic", false);

  c.task = &read_task(config);
  c.base = config.integer("task.base", c.task->smallest_base(), c.task->largest_base());
  c.base_examples = static_cast<uint64_t>(config.integer("task.base_examples", 1, kMost, 5'000'000));
  if (c.task->has_two_operands()) c.equal_share = config.number("task.equal_share", 0, 1, 0);

  c.models = config.integer("improve.models", 1, 64, 1);
  c.rounds = config.integer("improve.rounds", 0, c.task->last_round(c.base));
  c.problems = config.integer("improve.problems", 1, kMost);
  c.per_difficulty = config.boolean("improve.per_difficulty", false);
  c.base_weight = config.number("improve.base_weight", 0, 1e6, c.task->base_weight(c.base));
  c.accelerated = config.boolean("improve.accelerated", false);
  c.stop_when_empty = config.choice("improve.when_empty", when_empty, "continue") == "stop";
  read_filters(config, c);
  if (c.accelerated && c.task->accelerated_rungs(c.base).empty()) {
    c.probe_problems = config.integer("probe.problems", 1, kMost, 2048);
    c.probe_accuracy = config.number("probe.accuracy", 0, 1, 0.99);
  }

  c.batch = config.integer("train.batch", 1, 1 << 20);
  c.compute_type = config.choice("train.compute_type", types, "auto");
  if (c.compute_type == "auto")
    c.compute_type = c.device == "cuda" || multiplies_bfloat16() ? "bfloat16" : "float32";
  c.optimizer = train::read_optimizer(config);
  c.first = read_stage(config, "first_round");
  c.later = read_stage(config, "round");

  c.evaluation_problems = config.integer("evaluation.problems", 1, 1 << 20, 1024);
  c.final_problems = config.integer("evaluation.final_problems", 1, 1 << 20, c.evaluation_problems);
  c.evaluation_beyond = config.integer("evaluation.beyond", 0, 1000, 2);
  c.generation_batch = config.integer("generate.batch", 1, 1 << 20, 512);
  c.checkpoint_every = config.integer("checkpoint.every", 0, kMost, 500);
  c.checkpoint_keep = config.integer("checkpoint.keep", 1, 1000, 2);
  c.keep_models = config.boolean("checkpoint.models", true);
  return c;
}

bool may_change_on_resume(std::string_view key) {
  return key == "device" || key.starts_with("checkpoint.");
}

}  // namespace megalodon::improve
