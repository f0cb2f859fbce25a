#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/config.h"
#include "tasks/task.h"
#include "train/optimizer.h"

namespace megalodon::improve {

// The steps of a round and their learning rate: a line up to the peak, the peak, half a cosine (or a line)
// down to `final_fraction` of it, and that floor.
struct Stage {
  double peak = 0;
  int64_t warmup = 0, stable = 0, decay = 0, floor = 0;
  bool linear = false;
  double final_fraction = 0.01;

  int64_t steps() const { return warmup + stable + decay + floor; }
  double rate(int64_t step) const;  // step counts from 0
};

// Self-improvement (arXiv 2502.01612): what is learnt, from what, and how.
struct ImproveConfig {
  std::filesystem::path run;  // the run directory
  uint64_t seed = 1;
  std::string device;
  bool deterministic = false;  // on a GPU too

  const tasks::Task* task = nullptr;
  int64_t base = 0;            // the hardest labelled level
  uint64_t base_examples = 0;  // labelled examples, before they are read again
  double equal_share = 0;      // of them with operands of equal length

  int64_t models = 1;  // trained side by side, each on its own data
  int64_t rounds = 0;
  int64_t problems = 0;         // self-made for each model and round
  bool per_difficulty = false;  // `problems` counts for every difficulty of a round
  double base_weight = 0;       // in the mixture; an older set's weight is 1
  bool accelerated = false;     // rounds take all that the model already solves
  bool stop_when_empty = false;

  std::vector<std::string> filters;
  double vote_share = 0;        // of the models that must agree
  int64_t length_slack = 0;     // tokens that an answer may be shorter than the longest, and this is too many
  double confidence_share = 0;  // of the answers that are kept
  bool verify_steps = true, verify_ends = true;
  int64_t probe_problems = 0;
  double probe_accuracy = 0;

  int64_t batch = 0;         // sequences a step, of each model
  std::string compute_type;  // float32 or bfloat16
  train::AdamWOptions optimizer;
  Stage first, later;

  int64_t evaluation_problems = 0, final_problems = 0;  // of each difficulty; the last round's
  int64_t evaluation_beyond = 0;                        // rungs above the trained ones
  int64_t generation_batch = 0;                         // sequences at once, of each model
  int64_t checkpoint_every = 0;                         // steps; 0: at the end of a round alone
  int64_t checkpoint_keep = 0;
  bool keep_models = false;  // the weights of every round

  const Stage& stage(int64_t round) const { return round == 0 ? first : later; }
};

// All but [model]. Request errors name the key.
ImproveConfig read_improve_config(Config& config);

// Keys that may change between a run and its continuation.
bool may_change_on_resume(std::string_view key);

}  // namespace megalodon::improve
