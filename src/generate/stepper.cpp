#include "generate/stepper.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <map>
#include <vector>

namespace megalodon::generate {
namespace {

// Whether `alike` holds for all pairs of tensors of the two states.
template <class F>
bool all_tensors(const model::StreamState& a, const model::StreamState& b, const F& alike) {
  return a.position.defined() && b.position.defined() && alike(a.position, b.position) &&
         std::ranges::equal(a.tensors, b.tensors, [&](const auto& x, const auto& y) {
           return x.first == y.first && alike(x.second, y.second);
         });
}
bool share_tensors(const model::StreamState& a, const model::StreamState& b) {
  return all_tensors(a, b, [](const at::Tensor& x, const at::Tensor& y) { return x.is_same(y); });
}
bool have_same_shapes(const model::StreamState& a, const model::StreamState& b) {
  return all_tensors(a, b, [](const at::Tensor& x, const at::Tensor& y) {
    return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type();
  });
}

// Changes with every change of a weight. What a model derives from its weights it may keep, and a recorded
// step uses what it found.
uint64_t version_of_weights(const model::LanguageModel& model) {
  uint64_t version = 0;
  for (const auto& parameter : model.parameters()) version += parameter.value._version();
  return version;
}

// Those of one type by one kernel.
void copy_into(const model::StreamState& state, const model::StreamState& from) {
  std::map<at::ScalarType, std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>> pairs;
  const auto add = [&](const at::Tensor& to, const at::Tensor& value) {
    if (to.is_same(value)) return;
    auto& [destinations, values] = pairs[to.scalar_type()];
    destinations.push_back(to);
    values.push_back(value);
  };
  add(state.position, from.position);
  for (const auto& [name, tensor] : state.tensors) add(tensor, from.tensors.at(name));
  for (const auto& [type, of_type] : pairs) at::_foreach_copy_(of_type.first, of_type.second);
}

}  // namespace

void Stepper::read_in_place() {
  auto after = state_;
  logits_.copy_(model_.next_logits(tokens_.unsqueeze(1), after));
  copy_into(state_, after);
}

model::StreamState Stepper::fresh_state(int64_t batch, int64_t positions) {
  const std::pair wanted(batch, positions);
  if (graph_ == nullptr || wanted != wanted_ || state_.batch() != batch) {
    wanted_ = wanted;
    return model_.fresh_state(batch, positions);
  }
  model_.restart(state_);
  return state_;
}

void Stepper::take_over(model::StreamState& state) {
  const at::NoGradGuard no_grad;
  if (graph_ == nullptr || !have_same_shapes(state, state_)) return;
  copy_into(state_, state);
  state.position = state_.position;
  state.tensors = state_.tensors;
}

at::Tensor Stepper::step(const at::Tensor& tokens, model::StreamState& state) {
  const at::NoGradGuard no_grad;
  model_.reserve(state, state.highest + 1);
  if (!model_.device().is_cuda() || !share_tensors(state, state_)) {
    graph_.reset();
    logits_ = model_.next_logits(tokens.unsqueeze(1), state);
    tokens_ = tokens.clone();
    state_ = state;
    return logits_;
  }
  tokens_.copy_(tokens);
  const auto weights = version_of_weights(model_);
  if (graph_ == nullptr || weights != weights_) {
    graph_ = ops::DeviceGraph::record(model_.device(), [&] { read_in_place(); });
    weights_ = weights;
  }
  graph_->replay();
  ++state.lowest;
  ++state.highest;
  return logits_;
}

}  // namespace megalodon::generate
