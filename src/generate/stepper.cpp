#include "generate/stepper.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace megalodon::generate {
namespace {

bool share_tensors(const model::StreamState& a, const model::StreamState& b) {
  if (!a.position.is_same(b.position) || a.tensors.size() != b.tensors.size()) return false;
  return std::ranges::equal(a.tensors, b.tensors, [](const auto& x, const auto& y) {
    return x.first == y.first && x.second.is_same(y.second);
  });
}

}  // namespace

void Stepper::read_in_place() {
  auto after = state_;
  logits_.copy_(model_.next_logits(tokens_.unsqueeze(1), after));
  state_.position.copy_(after.position);
  for (auto& [name, tensor] : state_.tensors) {
    const auto& now = after.tensors.at(name);
    if (!now.is_same(tensor)) tensor.copy_(now);
  }
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
  if (graph_ == nullptr) graph_ = ops::DeviceGraph::record(model_.device(), [&] { read_in_place(); });
  graph_->replay();
  ++state.lowest;
  ++state.highest;
  return logits_;
}

}  // namespace megalodon::generate
