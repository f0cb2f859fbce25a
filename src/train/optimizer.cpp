#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "base/error.h"

namespace megalodon::train {

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
    Group group{{}, {}, {}, {}, {}, decayed ? options.weight_decay : 0};
    for (const auto& parameter : parameters) {
      if (parameter.is_matrix != decayed) continue;
      group.names.push_back(parameter.name);
      group.parameters.push_back(parameter.value);
      group.first_moments.push_back(at::zeros_like(parameter.value).set_requires_grad(false));
      group.second_moments.push_back(at::zeros_like(parameter.value).set_requires_grad(false));
      group.steps.push_back(at::zeros({}, group.first_moments.back().options()));
    }
    if (!group.parameters.empty()) groups_.push_back(std::move(group));
  }
}

std::vector<double> AdamW::gradient_norms() const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;  // of each parameter those of each model
  for (const auto& group : groups_) {
    for (const auto& parameter : group.parameters) {
      if (!parameter.grad().defined()) continue;
      for (const auto& gradient : parameter.grad().view({stack_, -1}).unbind(0))
        gradients.push_back(gradient);
    }
  }
  std::vector<double> total(static_cast<std::size_t>(stack_));
  if (gradients.empty()) return total;
  const auto norms = at::stack(at::_foreach_norm(gradients)).view({-1, stack_});
  const auto sums = norms.to(at::kDouble).square().sum(0).sqrt().cpu();  // [K]
  std::copy_n(sums.const_data_ptr<double>(), stack_, total.begin());
  return total;
}

void AdamW::step(double rate, const std::vector<double>& norms) {
  const at::NoGradGuard no_grad;
  const auto excess = [&](std::size_t k) {
    return options_.clip > 0 ? std::max(1.0, norms[k] / options_.clip) : 1.0;
  };
  const auto divisor = at::full({}, stack_ == 1 ? excess(0) : 1.0, groups_[0].steps[0].options());
  for (std::size_t k = 0; stack_ > 1 && k < norms.size(); ++k) {
    if (excess(k) == 1) continue;
    for (auto& group : groups_) {
      for (auto& parameter : group.parameters) {
        if (parameter.grad().defined()) parameter.mutable_grad()[static_cast<int64_t>(k)].div_(excess(k));
      }
    }
  }
  for (auto& group : groups_) step(group, rate, divisor);
  clear_gradients();
}

void AdamW::step(Group& group, double rate, const at::Tensor& gradient_divisor) {
  std::vector<at::Tensor> gradients;
  for (const auto& parameter : group.parameters) {
    gradients.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter));
  }
  for (auto& steps : group.steps) steps.add_(1);
  at::_fused_adamw_(group.parameters, gradients, group.first_moments, group.second_moments, {}, group.steps,
                    rate, options_.beta1, options_.beta2, group.weight_decay, options_.eps, /*amsgrad=*/false,
                    /*maximize=*/false, gradient_divisor);
}

void AdamW::clear_gradients() {
  for (auto& group : groups_) {
    for (auto& parameter : group.parameters) parameter.mutable_grad().reset();
  }
}

model::NamedTensors AdamW::state() const {
  model::NamedTensors tensors;
  for (const auto& group : groups_) {
    for (std::size_t i = 0; i < group.names.size(); ++i) {
      tensors.emplace_back("first_moment." + group.names[i], group.first_moments[i]);
      tensors.emplace_back("second_moment." + group.names[i], group.second_moments[i]);
      tensors.emplace_back("steps." + group.names[i], group.steps[i]);
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
      fill("steps." + group.names[i], group.steps[i]);
    }
  }
}

}  // namespace megalodon::train
