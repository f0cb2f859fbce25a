#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <utility>

#include "model/language_model.h"
#include "ops/device_graph.h"

namespace megalodon::generate {

// Reads one token a stream at a time. On a CUDA device, where launching a model's many small operations takes
// longer than they do, the step is recorded the second time that it is taken in the same tensors, and
// replayed from then on: it then updates the state's tensors in place.
class Stepper {
 public:
  explicit Stepper(const model::LanguageModel& model) : model_(model) {}

  // The logits [B, V] of what follows `tokens` [B] int64, on the model's device, in streams that go on from
  // `state`; they hold until the next step. Runs without gradients.
  at::Tensor step(const at::Tensor& tokens, model::StreamState& state);

  // A fresh state: in the tensors of the last step's state, which is lost, if a step was recorded in a state
  // that this gave for as many streams and positions.
  model::StreamState fresh_state(int64_t batch, int64_t positions);

  // `state` moves into the tensors of the last step's state, which is lost, if those have its shapes, so that
  // what was recorded serves again.
  void take_over(model::StreamState& state);

 private:
  void read_in_place();

  const model::LanguageModel& model_;
  at::Tensor tokens_, logits_;
  model::StreamState state_;            // shares the tensors of the last step
  std::pair<int64_t, int64_t> wanted_;  // of fresh_state()
  std::unique_ptr<ops::DeviceGraph> graph_;
  uint64_t weights_ = 0;  // the version of the weights that it was recorded with
};

}  // namespace megalodon::generate
