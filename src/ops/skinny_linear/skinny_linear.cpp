#include "ops/skinny_linear/skinny_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using OptionalList = c10::List<Optional>;
using Kernel = std::vector<at::Tensor>(at::TensorList x, at::TensorList weight, const OptionalList& up,
                                       const OptionalList& bias, const OptionalList& add,
                                       const OptionalList& norm_weight, const OptionalList& norm_bias,
                                       at::IntArrayRef norm, at::IntArrayRef silu, double eps);

int64_t rows_of(const at::Tensor& x) {
  return x.numel() / x.size(-1);
}

void check(const std::vector<SkinnyLayer>& layers) {
  constexpr auto op = "skinny_linear";
  for (const auto& layer : layers) {
    check_activation(op, "x", layer.x);
    TORCH_CHECK(layer.x.dim() >= 1 && layer.x.size(-1) >= 1,
                "[skinny_linear] x: expected at least one feature, got shape ", layer.x.sizes());
    check_shape(op, "x", layer.x, layers.front().x.sizes());
    check_type(op, "x", layer.x, layers.front().x.scalar_type());
    const int64_t in = layer.x.size(-1);
    check_shape(op, "weight", layer.weight, {-1, in});
    const int64_t out = layer.weight.size(0);
    const auto check_vector = [&](const char* name, const at::Tensor& vector, int64_t size) {
      if (vector.defined()) check_shape(op, name, vector, {size});
    };
    check_vector("bias", layer.bias, out);
    check_vector("norm_weight", layer.norm_weight, in);
    check_vector("norm_bias", layer.norm_bias, in);
    if (layer.up.defined()) check_shape(op, "up", layer.up, {out, in});
    TORCH_CHECK(!layer.up.defined() || layer.silu, "[skinny_linear] up: expected none without silu, got one");
    if (!layer.add.defined()) continue;
    auto shape = layer.x.sizes().vec();
    shape.back() = out;
    check_shape(op, "add", layer.add, shape);
    check_type(op, "add", layer.add, layer.x.scalar_type());
  }
}

bool has_kernel(const std::vector<SkinnyLayer>& layers) {
  if (layers.empty() || layers.size() > kMostSkinnyLayers || !has_skinny_kernel(layers.front().x))
    return false;
  for (const auto& layer : layers) {
    const auto is_float = [](const at::Tensor& x) { return !x.defined() || x.scalar_type() == at::kFloat; };
    const auto is_bfloat16 = [](const at::Tensor& x) {
      return !x.defined() || x.scalar_type() == at::kBFloat16;
    };
    if (!is_bfloat16(layer.weight) || !is_bfloat16(layer.up) || !is_float(layer.bias) ||
        !is_float(layer.norm_weight) || !is_float(layer.norm_bias))
      return false;
  }
  return true;
}

std::vector<at::Tensor> run_kernel(const std::vector<SkinnyLayer>& layers, double eps) {
  static const auto op = registered<Kernel>("megalodon::skinny_linear");
  const bool many = rows_of(layers.front().x) > kMostSkinnyNormRows;
  std::vector<at::Tensor> x, weight;
  OptionalList up, bias, add, norm_weight, norm_bias;
  std::vector<int64_t> norm, silu;
  const auto push = [](OptionalList& list, const at::Tensor& t) {
    list.push_back(t.defined() ? Optional(t) : std::nullopt);
  };
  for (const auto& layer : layers) {
    x.push_back(layer.x);
    weight.push_back(layer.weight);
    push(up, layer.up);
    push(bias, layer.bias);
    push(add, layer.add);
    push(norm_weight, layer.norm_weight);
    push(norm_bias, layer.norm_bias);
    norm.push_back(static_cast<int64_t>(many ? InputNorm::none : layer.norm));
    silu.push_back(layer.silu ? 1 : 0);
  }
  if (many) x = normalised_inputs(layers, eps);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, up, bias, add, norm_weight, norm_bias, norm, silu, eps);
}

}  // namespace

bool has_skinny_kernel(const at::Tensor& x) {
  return !at::GradMode::is_enabled() && x.is_cuda() && x.scalar_type() == at::kBFloat16 &&
         has_fast_kernel(x) && x.size(-1) % 32 == 0 && rows_of(x) <= kMostSkinnyRows;
}

std::vector<at::Tensor> skinny_linear(const std::vector<SkinnyLayer>& layers, double eps) {
  check(layers);
  return has_kernel(layers) ? run_kernel(layers, eps) : skinny_linear_reference(layers, eps);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "skinny_linear(Tensor[] x, Tensor[] weight, Tensor?[] up, Tensor?[] bias, Tensor?[] add, "
      "Tensor?[] norm_weight, Tensor?[] norm_bias, int[] norm, int[] silu, float eps) -> Tensor[]");
}

}  // namespace megalodon::ops
