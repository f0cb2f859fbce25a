#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <span>

#include "data/tokenizer.h"
#include "improve/mixture.h"
#include "model/language_model.h"
#include "train/training_step.h"

namespace megalodon::improve {

// Examples as tensors, padded on the right: [BOS] prompt label [EOS], with prompt and padding left out of the
// loss.
struct Batch {
  at::Tensor tokens;   // [N, L] int64
  at::Tensor targets;  // [N, L] int64, ops::kIgnoredTarget where nothing is to be learnt
};
Batch make_batch(const data::Tokenizer& tokenizer, std::span<const Example> examples);

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
  // One step on examples of which each model has its equal share, one model after the other.
  Outcome step(const Batch& batch, double rate);

  // The optimizer's state and the weights of all models, in the files of save_members().
  void save(const data::Tokenizer& tokenizer, const std::filesystem::path& folder) const;
  void load(const std::filesystem::path& folder);

 private:
  model::LanguageModel& models_;
  train::AdamW optimizer_;
  train::TrainingStep training_step_;
};

// Model directories with the tokenizer: FOLDER itself for one model, FOLDER/model-1 ... FOLDER/model-K for
// several.
void save_members(const model::LanguageModel& models, const data::Tokenizer& tokenizer,
                  const std::filesystem::path& folder);

}  // namespace megalodon::improve
