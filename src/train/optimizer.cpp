#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "base/error.h"

namespace megalodon::train {
namespace {

at::Tensor no_copy(const at::Tensor& parameter) {
  return at::empty({0}, parameter.options().dtype(at::kBFloat16).requires_grad(false));
}

}  // namespace

AdamWOptions read_optimizer(Config& config) {
  AdamWOptions o;
  o.beta1 = config.number("optimizer.beta1", 0, 0.999999, o.beta1);
  o.beta2 = config.number("optimizer.beta2", 0, 0.999999, o.beta2);
  o.eps = config.number("optimizer.eps", 1e-30, 1, o.eps);
  o.weight_decay = config.number("optimizer.weight_decay", 0, 10, o.weight_decay);
  o.clip = config.number("optimizer.clip", 0, 1e9, o.clip);
  return o;
}

AdamW::AdamW(const std::vector<model::Parameter>& parameters, AdamWOptions options, int64_t stack)
    : options_(options), stack_(stack) {
  for (const bool decayed : {true, false}) {
    Group group{{}, {}, {}, decayed ? options.weight_decay : 0};
    for (const auto& parameter : parameters) {
      if (parameter.is_matrix != decayed) continue;
      group.names.push_back(parameter.name);
      group.copies.push_back(parameter.rounded);
      group.rounded.push_back(no_copy(parameter.value));
      group.parameters.push_back(parameter.value);
      group.first_moments.push_back(at::zeros_like(parameter.value).set_requires_grad(false));
      group.second_moments.push_back(at::zeros_like(parameter.value).set_requires_grad(false));
    }
    if (group.parameters.empty()) continue;
    group.steps = at::zeros({}, group.first_moments.back().options());
    groups_.push_back(std::move(group));
  }
}

at::Tensor AdamW::gradient_norms() const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;  // of each parameter those of each model
  for (const auto& group : groups_) {
    for (const auto& parameter : group.parameters) {
      if (!parameter.grad().defined()) continue;
      for (const auto& gradient : parameter.grad().view({stack_, -1}).unbind(0))
        gradients.push_back(gradient);
    }
  }
  if (gradients.empty()) return at::zeros({stack_}, groups_[0].steps.options().dtype(at::kDouble));
  const auto norms = at::stack(at::_foreach_norm(gradients)).view({-1, stack_});
  return at::linalg_vector_norm(norms, 2, at::IntArrayRef{0}, /*keepdim=*/false, at::kDouble);
}

void AdamW::step(const at::Tensor& rate, const at::Tensor& norms, const at::Tensor& skipped) {
  const at::NoGradGuard no_grad;
  const auto divisors = (options_.clip > 0 ? (norms / options_.clip).clamp_min(1) : at::ones_like(norms))
                            .to(at::kFloat);  // [K]
  const auto skip = skipped.to(at::kFloat);
  for (auto& group : groups_) {
    std::vector<at::Tensor> gradients;
    for (auto& parameter : group.parameters) {
      const auto& gradient = parameter.mutable_grad();
      gradients.push_back(gradient.defined() ? gradient : at::zeros_like(parameter));
    }
    for (std::size_t i = 0; i < group.copies.size(); ++i) {
      const auto copy =
          group.copies[i] ? group.copies[i]->of(group.parameters[i], at::kBFloat16) : at::Tensor();
      group.rounded[i] = copy.defined() ? copy : no_copy(group.parameters[i]);
    }
    ops::adamw(group, gradients, divisors, rate, skip,
               {options_.beta1, options_.beta2, options_.eps, group.weight_decay});
    for (auto& parameter : group.parameters) parameter.mutable_grad().reset();
  }
  announce_change();
}

void AdamW::announce_change() const {
  for (const auto& group : groups_) {
    for (std::size_t i = 0; i < group.parameters.size(); ++i) {
      group.parameters[i].unsafeGetTensorImpl()->bump_version();
      if (group.rounded[i].numel() > 0) group.copies[i]->confirm(group.parameters[i]);
    }
  }
}

model::NamedTensors AdamW::state() const {
  model::NamedTensors tensors;
  for (const auto& group : groups_) {
    for (std::size_t i = 0; i < group.names.size(); ++i) {
      tensors.emplace_back("first_moment." + group.names[i], group.first_moments[i]);
      tensors.emplace_back("second_moment." + group.names[i], group.second_moments[i]);
      tensors.emplace_back("steps." + group.names[i], group.steps);
    }
  }
  return tensors;
}

void AdamW::load(const SafetensorsFile& file) {
  const auto fill = [&](const std::string& name, at::Tensor& into) {
    const auto stored = model::read_tensor(file, name);
    if (stored.sizes() != into.sizes() || stored.scalar_type() != into.scalar_type()) {
      fail_request("optimizer tensor '" + name + "' does not fit the model", file.path().string(),
                   "resume with the configuration of the run");
    }
    into.copy_(stored);
  };
  for (auto& group : groups_) {
    for (std::size_t i = 0; i < group.names.size(); ++i) {
      fill("first_moment." + group.names[i], group.first_moments[i]);
      fill("second_moment." + group.names[i], group.second_moments[i]);
      fill("steps." + group.names[i], group.steps);
    }
  }
}

}  // namespace megalodon::train
