#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "model/language_model.h"
#include "ops/device_graph.h"
#include "train/optimizer.h"

namespace megalodon::train {

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
  // tokens, targets [N, L] int64 as LanguageModel::mean_loss() takes them; the N rows go through in `parts`
  // equal parts (one for stacked models), one after the other.
  Outcome operator()(const at::Tensor& tokens, const at::Tensor& targets, double rate, int64_t parts = 1,
                     model::DropoutKeys* dropout = nullptr);

 private:
  struct Recorded {
    at::Tensor tokens, targets, numbers;
    std::unique_ptr<ops::DeviceGraph> graph;
  };
  at::Tensor run(const at::Tensor& tokens, const at::Tensor& targets, int64_t parts,
                 model::DropoutKeys* dropout);
  at::Tensor replay(const at::Tensor& tokens, const at::Tensor& targets);

  const model::LanguageModel& model_;
  AdamW& optimizer_;
  at::Tensor rate_;
  std::map<std::pair<int64_t, int64_t>, Recorded> recorded_;  // by N, L
};

}  // namespace megalodon::train
