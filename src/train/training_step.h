#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "model/language_model.h"
#include "ops/device_graph.h"
#include "train/optimizer.h"

namespace megalodon::train {

// What a step learns from, as LanguageModel::mean_loss() takes it.
struct Batch {
  at::Tensor tokens;                        // [N, L] int64; packed: [K, T], a row for each model
  at::Tensor targets;                       // the same, ops::kIgnoredTarget where nothing is to be learnt
  std::optional<ops::Sequences> sequences;  // where they are packed

  // Does not wait where the tensors are in pinned memory.
  Batch to(at::Device device) const;
  Batch pinned() const;
};

// One optimizer step: losses, gradients, clipping, update. On a CUDA device the step of a small model that
// drops nothing, whose launching takes longer than its work, is recorded the second time that it meets a
// shape, and replayed from then on.
class TrainingStep {
 public:
  TrainingStep(const model::LanguageModel& model, AdamW& optimizer);

  struct Outcome {
    std::vector<double> losses;          // of each model, nats a token
    std::vector<double> gradient_norms;  // of each model, before clipping
    bool skipped;                        // one of them is not finite: nothing changed
  };
  // The N rows go through in `parts` equal parts (one for stacked models and packed sequences), one after the
  // other.
  Outcome operator()(const Batch& batch, double rate, int64_t parts = 1,
                     model::DropoutKeys* dropout = nullptr) {
    start(batch, rate, parts, dropout);
    return finish();
  }
  // The same in two halves: a GPU works meanwhile.
  void start(const Batch& batch, double rate, int64_t parts = 1, model::DropoutKeys* dropout = nullptr);
  Outcome finish();

 private:
  using Shape = std::array<int64_t, 4>;  // N, L; of packed sequences their number and the longest's bound
  struct Recorded {
    Batch batch;
    at::Tensor numbers;
    std::unique_ptr<ops::DeviceGraph> graph;
  };
  static Shape shape_of(const Batch& batch);
  at::Tensor run(const Batch& batch, int64_t parts, model::DropoutKeys* dropout);
  at::Tensor replay(const Batch& batch);

  const model::LanguageModel& model_;
  AdamW& optimizer_;
  at::Tensor rate_;
  std::map<Shape, Recorded> recorded_;
  at::Tensor numbers_;  // of the step that was started
};

}  // namespace megalodon::train
