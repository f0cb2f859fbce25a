#include "model/projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "model/linear_products.h"
#include "ops/column_sum/column_sum.h"
#include "ops/skinny_linear/skinny_linear.h"

namespace megalodon::model {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Layers = std::vector<Linear>;

// The layer's result [..., out] of x [..., in].
at::Tensor value(const at::Tensor& x, Operand& operand, const Linear& layer, SavedWeight* saved = nullptr) {
  auto shape = x.sizes().vec();
  shape.back() = layer.weight.value().size(-2);
  return linear(operand, layer.weight, layer.bias, {}, saved).view(shape);
}

// Whether nobody else sees the memory of x, a gradient that an operator was handed.
bool is_own(const at::Tensor& x) {
  return x.use_count() == 1 && x.storage().use_count() == 1 && x.is_contiguous();
}

// The last result is x again. `biased`: the layer of each bias, in rising order, since a list for autograd
// holds no undefined tensors.
struct Projection : torch::autograd::Function<Projection> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights,
                               at::TensorList /*biases*/, const std::vector<int64_t>& biased,
                               const Layers& layers) {
    const at::AutoDispatchBelowADInplaceOrView below;  // so that results may be added to in place
    variable_list results, saved{x};
    Operand operand(x, Operand::Part::input);
    for (const auto& layer : layers) {
      SavedWeight weight;
      results.push_back(value(x, operand, layer, &weight));
      saved.insert(saved.end(), {weight.value, weight.scale});
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["biased"] = biased;
    ctx->saved_data["type"] = weights[0].scalar_type();
    ctx->set_materialize_grads(false);
    results.push_back(x);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto biased = ctx->saved_data["biased"].toIntVector();
    const auto type = ctx->saved_data["type"].toScalarType();  // of weights
    const auto& x = saved[0];
    const std::size_t layers = (saved.size() - 1) / 2;
    variable_list gradients(1 + layers + biased.size() + 2);  // the last are of `biased` and `layers`
    Operand input(x, Operand::Part::input_again);
    at::Tensor dx;
    if (const auto& d = dy.back(); d.defined()) dx = rows_of(is_own(d) ? d : d.clone(), saved[1]);
    for (std::size_t i = 0; i < layers; ++i) {
      if (!dy[i].defined()) continue;
      const SavedWeight weight{saved[1 + 2 * i], saved[2 + 2 * i]};
      Operand d(dy[i], Operand::Part::gradient);
      if (ctx->needs_input_grad(0)) add_input_gradient(dx, d, weight, x.scalar_type());
      if (ctx->needs_input_grad(1 + i)) gradients[1 + i] = weight_gradient(d, input, weight, type);
    }
    for (std::size_t b = 0; b < biased.size(); ++b) {
      const auto& d = dy[static_cast<std::size_t>(biased[b])];
      if (d.defined() && ctx->needs_input_grad(1 + layers + b))
        gradients[1 + layers + b] = ops::column_sum(d.reshape({-1, d.size(-1)}));
    }
    if (dx.defined()) gradients[0] = dx.view(x.sizes());
    return gradients;
  }
};

}  // namespace

std::vector<at::Tensor> project_and_pass(const at::Tensor& x, std::initializer_list<Linear> layers) {
  if (layers.begin()->weight.value().dim() == 2 && ops::has_skinny_kernel(x)) {
    std::vector<ops::SkinnyLayer> skinny;
    for (const auto& layer : layers) skinny.push_back({.x = x, .weight = layer.weight, .bias = layer.bias});
    auto results = ops::skinny_linear(skinny);
    results.push_back(x);
    return results;
  }
  if (!at::GradMode::is_enabled()) {
    variable_list results;
    Operand operand(x, Operand::Part::input);
    for (const auto& layer : layers) results.push_back(value(x, operand, layer));
    results.push_back(x);
    return results;
  }
  variable_list weights, biases;
  std::vector<int64_t> biased;
  for (const auto& [weight, bias] : layers) {
    if (bias.defined()) {
      biased.push_back(static_cast<int64_t>(weights.size()));
      biases.push_back(bias);
    }
    weights.push_back(weight);
  }
  return Projection::apply(x, at::TensorList(weights), at::TensorList(biases), biased, Layers(layers));
}

std::vector<at::Tensor> project(const at::Tensor& x, std::initializer_list<Linear> layers) {
  auto results = project_and_pass(x, layers);
  results.pop_back();
  return results;
}

at::Tensor project(const at::Tensor& x, const Weight& weight, const Weight& bias) {
  return project(x, {{weight, bias}})[0];
}

}  // namespace megalodon::model
