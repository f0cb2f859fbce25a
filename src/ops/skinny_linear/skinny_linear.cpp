#include "ops/skinny_linear/skinny_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/joined.h"
#include "ops/linear_add/linear_add.h"
#include "ops/product.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using OptionalList = c10::List<Optional>;
using Kernel = std::vector<at::Tensor>(at::TensorList x, at::TensorList weight, const OptionalList& up,
                                       const OptionalList& bias, const OptionalList& add,
                                       const OptionalList& norm_weight, const OptionalList& norm_bias,
                                       at::IntArrayRef norm, at::IntArrayRef silu, double eps);

using Finish = std::vector<at::Tensor>(at::TensorList sums, const OptionalList& up, const OptionalList& bias,
                                       const OptionalList& add, at::IntArrayRef silu);

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

void push(OptionalList& list, const at::Tensor& t) {
  list.push_back(t.defined() ? Optional(t) : std::nullopt);
}

std::vector<at::Tensor> run_kernel(const std::vector<SkinnyLayer>& layers, double eps) {
  static const auto op = registered<Kernel>("megalodon::skinny_linear");
  std::vector<at::Tensor> x, weight;
  OptionalList up, bias, add, norm_weight, norm_bias;
  std::vector<int64_t> norm, silu;
  for (const auto& layer : layers) {
    x.push_back(layer.x);
    weight.push_back(layer.weight);
    push(up, layer.up);
    push(bias, layer.bias);
    push(add, layer.add);
    push(norm_weight, layer.norm_weight);
    push(norm_bias, layer.norm_bias);
    norm.push_back(static_cast<int64_t>(layer.norm));
    silu.push_back(layer.silu ? 1 : 0);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, up, bias, add, norm_weight, norm_bias, norm, silu, eps);
}

// Whether one kernel takes the layers of more than kMostKernelRows rows.
bool has_wide_kernel(const std::vector<SkinnyLayer>& layers) {
  const auto lies = [](const at::Tensor& weight) {
    return !weight.defined() ||
           (weight.is_contiguous() && reinterpret_cast<std::uintptr_t>(weight.const_data_ptr()) % 16 == 0);
  };
  for (const auto& layer : layers)
    if (!lies(layer.weight) || !lies(layer.up)) return false;
  static const auto op = registered<bool(const at::Tensor&)>("megalodon::has_wide_products");
  return op.call(layers.front().x);
}

// That kernel, behind the norms.
std::vector<at::Tensor> run_wide_kernel(std::vector<SkinnyLayer> layers, double eps) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto inputs = normalised_inputs(layers, eps);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    auto& layer = layers[i];
    layer.x = inputs[i], layer.norm = InputNorm::none;
  }
  return run_kernel(layers, eps);
}

// Whether a layer is its product, or that added to something.
bool is_plain(const SkinnyLayer& layer) {
  return !layer.bias.defined() && !layer.silu;
}

void append_weights(const SkinnyLayer& layer, std::vector<at::Tensor>& weights) {
  weights.push_back(layer.weight);
  if (layer.up.defined()) weights.push_back(layer.up);
}

// The products [rows, out] in float32 of the first layer that is left, and of those after it whose weights
// lie behind its own and have the same input; `next` is moved behind them.
std::vector<at::Tensor> sums_of_joint(const std::vector<SkinnyLayer>& layers,
                                      const std::vector<at::Tensor>& inputs, std::size_t& next) {
  const auto& input = inputs[next];
  const auto rows = input.reshape({-1, input.size(-1)});
  std::vector<at::Tensor> weights;
  append_weights(layers[next++], weights);
  auto joint = joined(weights, 0);
  while (joint.defined() && next < layers.size() && inputs[next].is_same(input) && !is_plain(layers[next])) {
    auto more = weights;
    append_weights(layers[next], more);
    const auto larger = joined(more, 0);
    if (!larger.defined()) break;
    joint = larger, weights = std::move(more), ++next;
  }
  std::vector<at::Tensor> sums;
  if (!joint.defined()) {
    for (const auto& weight : weights) sums.push_back(product(rows, weight.t(), at::kFloat));
    return sums;
  }
  const auto all = product(rows, joint.t(), at::kFloat);
  for (int64_t first = 0; const auto& weight : weights) {
    sums.push_back(all.narrow(1, first, weight.size(0)));
    first += weight.size(0);
  }
  return sums;
}

// Where there is no such kernel: products by a library, and one kernel for what stands behind them.
std::vector<at::Tensor> run_products(const std::vector<SkinnyLayer>& layers, double eps) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto inputs = normalised_inputs(layers, eps);
  std::vector<at::Tensor> results(layers.size()), sums;
  std::vector<std::size_t> finished;  // the layers that the kernel finishes
  OptionalList up, bias, add;
  std::vector<int64_t> silu;
  for (std::size_t i = 0; i < layers.size();) {
    if (is_plain(layers[i])) {
      const auto rows = inputs[i].reshape({-1, inputs[i].size(-1)});
      const auto& [weight, added] = std::tie(layers[i].weight, layers[i].add);
      const auto onto = [&] { return added.reshape({-1, weight.size(0)}); };
      results[i] = added.defined() ? linear_add(rows, weight, onto()) : product(rows, weight.t());
      ++i;
      continue;
    }
    const auto first = i;
    const auto of_joint = sums_of_joint(layers, inputs, i);
    for (std::size_t l = first, k = 0; l < i; ++l) {
      const auto& layer = layers[l];
      finished.push_back(l);
      sums.push_back(of_joint[k++]);
      push(up, layer.up.defined() ? of_joint[k++] : at::Tensor());
      push(bias, layer.bias);
      push(add, layer.add.defined() ? layer.add.reshape({-1, layer.weight.size(0)}) : at::Tensor());
      silu.push_back(layer.silu ? 1 : 0);
    }
  }
  if (!sums.empty()) {
    static const auto op = registered<Finish>("megalodon::finish_products");
    const auto of_kernel = op.call(sums, up, bias, add, silu);
    for (std::size_t k = 0; k < finished.size(); ++k) results[finished[k]] = of_kernel[k];
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    auto shape = layers[i].x.sizes().vec();
    shape.back() = layers[i].weight.size(0);
    results[i] = results[i].view(shape);
  }
  return results;
}

}  // namespace

bool has_skinny_kernel(const at::Tensor& x) {
  return !at::GradMode::is_enabled() && x.is_cuda() && x.scalar_type() == at::kBFloat16 &&
         has_fast_kernel(x) && x.size(-1) % 32 == 0 && rows_of(x) <= kMostSkinnyRows;
}

std::vector<at::Tensor> skinny_linear(const std::vector<SkinnyLayer>& layers, double eps) {
  check(layers);
  if (!has_kernel(layers)) return skinny_linear_reference(layers, eps);
  if (rows_of(layers.front().x) <= kMostKernelRows) return run_kernel(layers, eps);
  return has_wide_kernel(layers) ? run_wide_kernel(layers, eps) : run_products(layers, eps);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "skinny_linear(Tensor[] x, Tensor[] weight, Tensor?[] up, Tensor?[] bias, Tensor?[] add, "
      "Tensor?[] norm_weight, Tensor?[] norm_bias, int[] norm, int[] silu, float eps) -> Tensor[]");
  m.def("has_wide_products(Tensor x) -> bool");
  m.def(
      "finish_products(Tensor[] sums, Tensor?[] up, Tensor?[] bias, Tensor?[] add, int[] silu) -> Tensor[]");
}

}  // namespace megalodon::ops
