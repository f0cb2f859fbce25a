#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <span>

#include "data/tokenizer.h"
#include "improve/mixture.h"
#include "model/language_model.h"
#include "train/training_step.h"

namespace megalodon::improve {

// Examples as tensors: [BOS] prompt label [EOS], with the prompt left out of the loss. Padded on the right;
// rounded up to a multiple of `multiple` positions.
train::Batch padded_batch(const data::Tokenizer& tokenizer, std::span<const Example> examples,
                          int64_t multiple = 1);
// The same packed, for `models` of which each has its equal share of the examples, one model after the other.
// What is left of a row, so that few different shapes come up, is sequences without targets.
train::Batch packed_batch(const data::Tokenizer& tokenizer, std::span<const Example> examples,
                          int64_t models = 1);

// The tokens of an unanswered prompt.
std::vector<int32_t> prompt_tokens(const data::Tokenizer& tokenizer, std::string_view prompt);

// The models of a run, as one stack, and their optimizer.
class Learner {
 public:
  Learner(model::LanguageModel& models, const train::AdamWOptions& options)
      : models_(models),
        optimizer_(models.parameters(), options, models.stack()),
        training_step_(models, optimizer_) {}

  struct Outcome {
    double loss;           // nats a token, the mean over the models
    double gradient_norm;  // the largest of them
    int64_t tokens;        // padding included
    bool skipped;          // not finite; nothing changed
  };
  // What a step learns: examples of which each model has its equal share, one model after the other.
  train::Batch batch(const data::Tokenizer& tokenizer, std::span<const Example> examples) const;
  // One step, in two halves: a GPU works between them.
  void start(const train::Batch& batch, double rate);
  Outcome finish();

  // The optimizer's state and the weights of all models, in the files of save_members().
  void save(const data::Tokenizer& tokenizer, const std::filesystem::path& folder) const;
  void load(const std::filesystem::path& folder);

 private:
  model::LanguageModel& models_;
  train::AdamW optimizer_;
  train::TrainingStep training_step_;
  int64_t tokens_ = 0;  // of the step that was started
};

// Model directories with the tokenizer: FOLDER itself for one model, FOLDER/model-1 ... FOLDER/model-K for
// several.
void save_members(const model::LanguageModel& models, const data::Tokenizer& tokenizer,
                  const std::filesystem::path& folder);

}  // namespace megalodon::improve
