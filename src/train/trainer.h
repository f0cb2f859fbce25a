#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "data/corpus.h"
#include "data/order.h"
#include "data/tokenizer.h"
#include "model/language_model.h"
#include "train/checkpoint.h"
#include "train/metrics.h"
#include "train/optimizer.h"
#include "train/train_config.h"
#include "train/training_step.h"

namespace megalodon::train {

// Training of one model on one corpus. A step is a function of the weights, the optimizer's state and the
// step's number alone, so that a run that was killed and resumed gives the same losses, bit for bit on a CPU,
// as one that was not.
class Trainer {
 public:
  Trainer(const TrainConfig& config, model::LanguageModel& model, const data::Tokenizer& tokenizer,
          const data::Corpus& training, const data::Corpus& validation);

  // Continues from the newest whole checkpoint; the step it stands at, 0 where there is none.
  int64_t resume();

  // Trains to the last step, or to the interruption of the process; saves and validates on the way as
  // configured, and at the end. True where the last step was reached. Ten steps in a row that are not finite
  // are a work error: the last good checkpoint stays.
  bool run(const std::vector<Listener*>& listeners);

 private:
  StepMetrics step();
  ValidationMetrics validate() const;
  void save() const;
  at::Tensor windows(const data::Corpus& corpus,
                     const std::vector<int64_t>& starts) const;  // [n, context + 1] int64

  const TrainConfig& config_;
  model::LanguageModel& model_;
  const data::Tokenizer& tokenizer_;
  const data::Corpus& training_;
  const data::Corpus& validation_;
  const data::WindowOrder order_;
  AdamW optimizer_;
  TrainingStep training_step_;
  CheckpointFolder checkpoints_;
  int64_t step_ = 0;  // steps done
  int64_t skipped_in_row_ = 0;
  double seconds_ = 0;  // of training, all sittings
};

}  // namespace megalodon::train
