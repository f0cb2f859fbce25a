#include <ATen/ATen.h>

#include "ops/layer_norm/layer_norm.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/skinny_linear/skinny_linear.h"
#include "ops/swiglu/swiglu.h"

namespace megalodon::ops {
namespace {

std::optional<at::Tensor> optional(const at::Tensor& x) {
  return x.defined() ? std::optional(x) : std::nullopt;
}

bool is_same_input(const SkinnyLayer& a, const SkinnyLayer& b) {
  return a.x.is_same(b.x) && a.norm == b.norm && a.norm_weight.is_same(b.norm_weight);
}

at::Tensor input(const SkinnyLayer& layer, double eps) {
  if (layer.norm == InputNorm::rms) return rms_norm(layer.x, optional(layer.norm_weight), eps);
  if (layer.norm == InputNorm::layer)
    return layer_norm(layer.x, optional(layer.norm_weight), optional(layer.norm_bias), eps);
  return layer.x;
}

}  // namespace

std::vector<at::Tensor> normalised_inputs(const std::vector<SkinnyLayer>& layers, double eps) {
  std::vector<at::Tensor> inputs;
  for (std::size_t i = 0; i < layers.size(); ++i)
    inputs.push_back(i > 0 && is_same_input(layers[i - 1], layers[i]) ? inputs.back()
                                                                      : input(layers[i], eps));
  return inputs;
}

std::vector<at::Tensor> skinny_linear_reference(const std::vector<SkinnyLayer>& layers, double eps) {
  const auto inputs = normalised_inputs(layers, eps);
  std::vector<at::Tensor> results;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto& layer = layers[i];
    const auto cast = [&](const at::Tensor& t) { return t.to(layer.x.scalar_type()); };
    auto y =
        at::linear(inputs[i], cast(layer.weight), layer.bias.defined() ? cast(layer.bias) : at::Tensor());
    if (layer.silu)
      y = swiglu(y, layer.up.defined() ? optional(at::linear(inputs[i], cast(layer.up))) : std::nullopt);
    results.push_back(layer.add.defined() ? y + layer.add : y);
  }
  return results;
}

}  // namespace megalodon::ops
