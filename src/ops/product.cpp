#include "ops/product.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "base/parallel.h"
#include "ops/check.h"
#include "ops/device.h"
#include "ops/registered.h"
#include "ops/simd_dispatch.h"

namespace megalodon::ops {
namespace {

// y = x w^T + bias, x [M, K], w [N, K].
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                          std::string_view, c10::List<std::optional<at::Scalar>>,
                          std::optional<std::string_view>);
using Order = at::Tensor(const at::Tensor&, std::optional<int64_t>);

// torch's names for oneDNN's linear layer, and for a weight in the order that suits products with so many
// rows.
template <class F>
std::unique_ptr<c10::TypedOperatorHandle<F>> find(const char* name) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  return found ? std::make_unique<c10::TypedOperatorHandle<F>>(found->template typed<F>()) : nullptr;
}
const auto& linear_op() {
  static const auto op = find<Linear>("mkldnn::_linear_pointwise");
  return op;
}
const auto& order_op() {
  static const auto op = find<Order>("mkldnn::_reorder_linear_weight");
  return op;
}

at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias) {
  TORCH_CHECK(has_onednn_product(), "onednn_product: this torch has no mkldnn::_linear_pointwise");
  return linear_op()->call(x, w, bias.defined() ? std::optional(bias) : std::nullopt, "none",
                           c10::List<std::optional<at::Scalar>>(), "");
}

// Smaller products are done before oneDNN has begun.
constexpr int64_t kWorthIt = 1 << 20;

bool is_worth_it(const at::Tensor& a, int64_t columns) {
  return a.is_cpu() && a.size(-2) * a.size(-1) * columns >= kWorthIt;
}

bool is_float_for_onednn() {
  static const bool is_faster = mkl_takes_avx2() && has_onednn_product();
  return is_faster;
}

bool is_for_onednn(const at::Tensor& a, const at::Tensor& b) {
  return is_float_for_onednn() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         is_worth_it(a, b.size(-1)) && !needs_gradient({a, b});
}

// Whether rows or columns lie in memory, at addresses that are multiples of 16 bytes.
bool is_aligned(const at::Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
         ((x.stride(1) == 1 && x.stride(0) % 8 == 0) || (x.stride(0) == 1 && x.stride(1) % 8 == 0));
}
bool has_aligned_rows(const at::Tensor& x) {
  return x.stride(1) == 1 && is_aligned(x);
}

// Products of bfloat16 matrices on a GPU that the plugin makes.
bool is_for_plugin(const at::Tensor& a, const at::Tensor& b) {
  return a.is_cuda() && a.dim() == 2 && a.scalar_type() == at::kBFloat16 &&
         b.scalar_type() == at::kBFloat16 && has_cuda_kernels() && a.numel() > 0 && b.numel() > 0 &&
         is_aligned(a) && is_aligned(b) && b.size(1) % 8 == 0 && !needs_gradient({a, b});
}

using Optional = std::optional<at::Tensor>;
// y = a b + bias + added.
void plugin_product(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const Optional& bias = {},
                    const Optional& added = {}) {
  static const auto op = registered<void(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const Optional&, const Optional&)>("megalodon::product_into");
  op.call(y, a, b, bias, added);
}
at::Tensor new_plugin_product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type,
                              const Optional& bias = {}, const Optional& added = {}) {
  const auto y = at::empty({a.size(0), b.size(1)}, a.options().dtype(type));
  plugin_product(y, a, b, bias, added);
  return y;
}

bool is_faster_in_order(at::ScalarType type) {
  static const bool has_order = has_onednn_product() && order_op() != nullptr;
  return has_order &&
         (type == at::kFloat ? is_float_for_onednn()
                             : type == at::kBFloat16 && bfloat16_products() != Bfloat16Products::widened);
}

// What was made of a weight; `weight` keeps its address from becoming another's.
struct Kept {
  at::Tensor weight;
  at::ScalarType type;
  at::Tensor cast, ordered;
};
thread_local std::unique_ptr<std::unordered_map<const c10::TensorImpl*, Kept>> constant_weights;

Kept* kept(const at::Tensor& weight, at::ScalarType type) {
  if (constant_weights == nullptr || !weight.is_cpu()) return nullptr;
  auto& found = (*constant_weights)[weight.unsafeGetTensorImpl()];
  if (!found.weight.defined() || found.type != type) found = {weight, type, {}, {}};
  return &found;
}

// x [R, C] as columns: y [C, R]. In squares, so that neither is read or written line by line of the cache.
void exchange(const float* x, int64_t R, int64_t C, float* y) {
  constexpr int64_t side = 16;
  parallel_for((C + side - 1) / side, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * side; c < std::min(end * side, C); c += side) {
      const int64_t columns = std::min(side, C - c);
      for (int64_t r = 0; r < R; r += side) {
        const int64_t rows = std::min(side, R - r);
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < rows; ++i) y[(c + j) * R + r + i] = x[(r + i) * C + c + j];
      }
    }
  });
}

// torch's own copy of columns is of one thread.
at::Tensor rows_in_memory(const at::Tensor& a) {
  if (a.is_contiguous() || !a.t().is_contiguous()) return a.contiguous();
  auto rows = at::empty(a.sizes(), a.options());
  exchange(a.const_data_ptr<float>(), a.size(1), a.size(0), rows.mutable_data_ptr<float>());
  return rows;
}

at::Tensor onednn_products(const at::Tensor& a, const at::Tensor& b) {
  auto y = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  for (int64_t s = 0; s < a.size(0); ++s) y[s].copy_(onednn_product(a[s], b[s]));
  return y;
}

}  // namespace

bool has_onednn_product() {
  return linear_op() != nullptr;
}

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias) {
  // The left side is copied unless its rows lie in memory: then rather the smaller of both.
  if (!bias.defined() && !a.is_contiguous() && b.size(1) < a.size(0))
    return onednn_linear(rows_in_memory(b.t()), a, {}).t().contiguous();
  return onednn_linear(rows_in_memory(a), b.t(), bias);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const bool stacked = a.dim() == 3;
  if (is_for_plugin(a, b)) return new_plugin_product(a, b, a.scalar_type());
  if (is_for_onednn(a, b)) return stacked ? onednn_products(a, b) : onednn_product(a, b);
  return stacked ? at::bmm(a, b) : at::mm(a, b);
}

at::Tensor product_with_bias(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias,
                             const at::Tensor& added) {
  if (is_for_plugin(a, b) && bias.scalar_type() == a.scalar_type() && bias.is_contiguous())
    return new_plugin_product(a, b, a.scalar_type(), bias,
                              added.defined() ? Optional(added.contiguous()) : std::nullopt);
  const auto y = is_for_onednn(a, b) ? onednn_product(a, b, bias) : at::addmm(bias, a, b);
  return added.defined() ? y.add_(added) : y;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (type == a.scalar_type() || !a.is_cuda()) return product(a, b).to(type);
  if (type == at::kFloat && is_for_plugin(a, b)) return new_plugin_product(a, b, type);
  return a.dim() == 3 ? at::bmm(a, b, type) : at::mm(a, b, type);
}

void put_product(at::Tensor to, const at::Tensor& a, const at::Tensor& b) {
  if (is_for_plugin(a, b) && to.scalar_type() == a.scalar_type() && has_aligned_rows(to))
    plugin_product(to, a, b);
  else if (is_for_onednn(a, b))
    to.copy_(onednn_product(a, b));
  else
    at::mm_out(to, a, b);
}

void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b) {
  const auto type = sum.scalar_type();
  if (a.is_cpu() && (type != a.scalar_type() || is_for_onednn(a, b))) {
    sum.add_(product(a, b));
  } else if (is_for_plugin(a, b) && (type == at::kFloat || type == at::kBFloat16) && has_aligned_rows(sum)) {
    plugin_product(sum, a, b, {}, sum);
  } else if (type == a.scalar_type()) {
    a.dim() == 3 ? sum.baddbmm_(a, b) : sum.addmm_(a, b);
  } else {
    a.dim() == 3 ? at::baddbmm_out(sum, sum, a, b, type) : at::addmm_out(sum, sum, a, b, type);
  }
}

at::Tensor linear_layer(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const auto type = x.scalar_type();
  const auto of_bias = bias.defined() ? bias.to(type) : bias;
  auto* const known = kept(weight, type);
  if (known != nullptr && weight.dim() == 2 && is_worth_it(x, weight.size(0)) && is_faster_in_order(type)) {
    if (!known->ordered.defined()) known->ordered = order_op()->call(weight.detach().to(type), x.size(0));
    return onednn_linear(x, known->ordered, of_bias);
  }
  const auto cast = known != nullptr && known->cast.defined() ? known->cast : weight.to(type);
  if (known != nullptr) known->cast = cast;
  const auto w = cast.transpose(-2, -1);
  return bias.defined() ? product_with_bias(x, w, of_bias) : product(x, w);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("product_into(Tensor(a!) y, Tensor a, Tensor b, Tensor? bias, Tensor? added) -> ()");
}

ConstantWeights::ConstantWeights() : outermost_(constant_weights == nullptr) {
  if (outermost_) constant_weights = std::make_unique<std::unordered_map<const c10::TensorImpl*, Kept>>();
}

ConstantWeights::~ConstantWeights() {
  if (outermost_) constant_weights.reset();
}

}  // namespace megalodon::ops
