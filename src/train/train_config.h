#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "base/config.h"
#include "model/config.h"
#include "train/optimizer.h"
#include "train/schedule.h"

namespace megalodon::train {

struct TrainConfig {
  std::filesystem::path run;  // the run directory
  uint64_t seed = 1;
  std::string device;          // cpu, cuda or auto
  bool deterministic = false;  // on a GPU too

  struct {
    std::vector<std::string> train;       // text, jsonl, folders of them, or folders of token shards
    std::vector<std::string> validation;  // as above; empty: a share of the training documents
    double validation_share = 0;
    std::string tokenizer;  // byte, character, or a folder or file of one
  } data;

  std::string from;  // a model directory to fine-tune, or ""
  int64_t steps = 0;
  int64_t batch = 0;         // sequences a step
  int64_t micro_batch = 0;   // sequences at once; the gradients of a step's micro-batches add up
  int64_t context = 0;       // tokens a sequence
  std::string compute_type;  // float32 or bfloat16
  std::string products;      // of linear layers: compute_type or float8
  bool recompute = true;     // what is cheap, in the backward pass, instead of keeping it

  AdamWOptions optimizer;
  Schedule schedule;
  int64_t validation_every = 0;    // steps; 0: at the end alone
  int64_t validation_windows = 0;  // sequences of the context's length
  int64_t checkpoint_every = 0;    // steps; 0: at the end alone
  int64_t checkpoint_keep = 0;

  int64_t tokens_per_step() const { return batch * context; }
};

// All but [model], which needs the tokenizer's vocabulary (model::read_model_config); finish() is the
// caller's.
TrainConfig read_train_config(Config& config);

// Keys that may change between a run and its continuation.
bool may_change_on_resume(std::string_view key);

}  // namespace megalodon::train
