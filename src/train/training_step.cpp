#include "train/training_step.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

namespace megalodon::train {
namespace {

// Steps of so many operations or more take a GPU far longer than their launching takes the CPU.
constexpr double kLargeStep = 2e13;
constexpr std::size_t kMostShapes = 64;

bool is_small(const model::LanguageModel& model, const at::Tensor& tokens) {
  const int64_t of_one = model.parameter_count() / model.stack();
  return 6 * static_cast<double>(of_one) * static_cast<double>(tokens.numel()) < kLargeStep;
}

bool drops(const model::LanguageModel& model) {
  return std::visit(
      [](const auto& c) {
        bool any = c.dropout > 0 || c.attention_dropout > 0;
        if constexpr (requires { c.hidden_dropout; }) any = any || c.hidden_dropout > 0;
        return any;
      },
      model.config());
}

}  // namespace

TrainingStep::TrainingStep(const model::LanguageModel& model, AdamW& optimizer)
    : model_(model),
      optimizer_(optimizer),
      rate_(at::zeros(
          {}, at::TensorOptions(model.device()).dtype(model.device().is_cpu() ? at::kDouble : at::kFloat))) {}

// Losses and gradient norms, [2, K] float64.
at::Tensor TrainingStep::run(const at::Tensor& tokens, const at::Tensor& targets, int64_t parts,
                             model::DropoutKeys* dropout) {
  TORCH_CHECK(parts == 1 || model_.stack() == 1, "TrainingStep: stacked models take their rows in one part");
  const int64_t rows = tokens.size(0) / parts;
  auto losses = at::zeros({model_.stack()}, rate_.options().dtype(at::kDouble));
  for (int64_t part = 0; part < parts; ++part) {
    const auto of_part = [&](const at::Tensor& x) { return x.narrow(0, part * rows, rows); };
    const auto loss =
        model_.mean_loss(of_part(tokens), of_part(targets), dropout) / static_cast<double>(parts);
    torch::autograd::backward({loss.sum()}, {});
    losses += loss.detach().view(-1);
  }
  const auto norms = optimizer_.gradient_norms();
  auto numbers = at::stack({losses, norms});
  optimizer_.step(rate_, norms, numbers.isfinite().all().logical_not());
  return numbers;
}

at::Tensor TrainingStep::replay(const at::Tensor& tokens, const at::Tensor& targets) {
  const std::pair shape(tokens.size(0), tokens.size(1));
  const auto found = recorded_.find(shape);
  if (found == recorded_.end()) {
    if (recorded_.size() == kMostShapes) recorded_.clear();
    recorded_[shape] = {tokens.clone(), targets.clone(), run(tokens, targets, 1, nullptr), nullptr};
    return recorded_[shape].numbers;
  }
  auto& step = found->second;
  step.tokens.copy_(tokens);
  step.targets.copy_(targets);
  if (step.graph == nullptr) {
    step.graph = ops::DeviceGraph::record(
        model_.device(), [&] { step.numbers.copy_(run(step.tokens, step.targets, 1, nullptr)); });
  }
  step.graph->replay();
  optimizer_.announce_change();
  return step.numbers;
}

TrainingStep::Outcome TrainingStep::operator()(const at::Tensor& tokens, const at::Tensor& targets,
                                               double rate, int64_t parts, model::DropoutKeys* dropout) {
  const auto device = model_.device();
  rate_.fill_(rate);
  const auto tokens_ = tokens.to(device), targets_ = targets.to(device);
  const bool repeats =
      device.is_cuda() && parts == 1 && is_small(model_, tokens) && (dropout == nullptr || !drops(model_));
  const auto numbers = (repeats ? replay(tokens_, targets_) : run(tokens_, targets_, parts, dropout)).cpu();
  const auto* const number = numbers.const_data_ptr<double>();
  const int64_t K = model_.stack();
  return {{number, number + K},
          {number + K, number + 2 * K},
          !std::all_of(number, number + 2 * K, [](double x) { return std::isfinite(x); })};
}

}  // namespace megalodon::train
