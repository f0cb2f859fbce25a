#include "train/training_step.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

namespace megalodon::train {
namespace {

// Steps of so many operations or more take a GPU far longer than their launching takes the CPU.
constexpr double kLargeStep = 2e13;
constexpr std::size_t kMostShapes = 256;

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

Batch Batch::to(at::Device device) const {
  const auto moved = [&](const at::Tensor& x) {
    return x.to(device, x.scalar_type(), /*non_blocking=*/true);
  };
  Batch batch{moved(tokens), moved(targets), sequences};
  if (sequences) batch.sequences->borders = moved(sequences->borders);
  return batch;
}

Batch Batch::pinned() const {
  Batch batch{tokens.pin_memory(), targets.pin_memory(), sequences};
  if (sequences) batch.sequences->borders = sequences->borders.pin_memory();
  return batch;
}

TrainingStep::Shape TrainingStep::shape_of(const Batch& batch) {
  const auto& sequences = batch.sequences;
  return {batch.tokens.size(0), batch.tokens.size(1), sequences ? sequences->borders.numel() - 1 : 0,
          sequences ? sequences->longest : 0};
}

// Losses and gradient norms, [2, K] float64.
at::Tensor TrainingStep::run(const Batch& batch, int64_t parts, model::DropoutKeys* dropout) {
  TORCH_CHECK(parts == 1 || (model_.stack() == 1 && !batch.sequences),
              "TrainingStep: stacked models and packed sequences go through in one part");
  const int64_t rows = batch.tokens.size(0) / parts;
  auto losses = at::zeros({model_.stack()}, rate_.options().dtype(at::kDouble));
  for (int64_t part = 0; part < parts; ++part) {
    const auto of_part = [&](const at::Tensor& x) { return x.narrow(0, part * rows, rows); };
    const auto tokens = of_part(batch.tokens), targets = of_part(batch.targets);
    const auto mean = batch.sequences ? model_.mean_loss(tokens, targets, *batch.sequences)
                                      : model_.mean_loss(tokens, targets, dropout);
    const double share = 1 / static_cast<double>(parts);
    torch::autograd::backward({mean}, {at::full_like(mean, share)});
    losses.add_(mean.detach().view(-1), share);
  }
  const auto norms = optimizer_.gradient_norms();
  auto numbers = at::stack({losses, norms});
  const auto skipped = (numbers * 0).sum().ne(0);  // where one is not finite, the sum is not a number
  optimizer_.step(rate_, norms, skipped);
  return numbers;
}

at::Tensor TrainingStep::replay(const Batch& batch) {
  const auto shape = shape_of(batch);
  const auto found = recorded_.find(shape);
  if (found == recorded_.end()) {
    if (recorded_.size() == kMostShapes) recorded_.clear();
    Batch own{batch.tokens.clone(), batch.targets.clone(), batch.sequences};
    if (own.sequences) own.sequences->borders = own.sequences->borders.clone();
    auto& step = recorded_[shape] = {std::move(own), run(batch, 1, nullptr), nullptr};
    return step.numbers;
  }
  auto& step = found->second;
  step.batch.tokens.copy_(batch.tokens);
  step.batch.targets.copy_(batch.targets);
  if (batch.sequences && step.batch.sequences) step.batch.sequences->borders.copy_(batch.sequences->borders);
  if (step.graph == nullptr) {
    const auto neighbour =
        std::ranges::find_if(recorded_, [](const auto& other) { return other.second.graph != nullptr; });
    step.graph = ops::DeviceGraph::record(
        model_.device(), [&] { step.numbers.copy_(run(step.batch, 1, nullptr)); },
        neighbour == recorded_.end() ? nullptr : neighbour->second.graph.get());
  }
  step.graph->replay();
  optimizer_.announce_change();
  return step.numbers;
}

void TrainingStep::start(const Batch& batch, double rate, int64_t parts, model::DropoutKeys* dropout) {
  const auto device = model_.device();
  rate_.fill_(rate);
  model_.keep_rounded();
  const auto there = batch.to(device);
  const bool repeats = device.is_cuda() && parts == 1 && is_small(model_, batch.tokens) &&
                       (dropout == nullptr || !drops(model_));
  numbers_ = repeats ? replay(there) : run(there, parts, dropout);
}

TrainingStep::Outcome TrainingStep::finish() {
  const auto numbers = numbers_.cpu();
  const auto* const number = numbers.const_data_ptr<double>();
  const int64_t K = model_.stack();
  return {{number, number + K},
          {number + K, number + 2 * K},
          !std::all_of(number, number + 2 * K, [](double x) { return std::isfinite(x); })};
}

}  // namespace megalodon::train
