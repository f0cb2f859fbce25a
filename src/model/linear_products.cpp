#include "model/linear_products.h"

#include <ATen/ATen.h>

#include "ops/linear_add/linear_add.h"
#include "ops/product.h"

namespace megalodon::model {
namespace {

bool goes_in_float8(const at::Tensor& rows, const Weight& weight) {
  const auto& w = weight.value();
  return weight.in_float8() && w.dim() == 2 && ops::suits_float8(rows, rows.size(0), w.size(0), w.size(1));
}

at::Tensor saved_cast(const Weight& weight, const at::Tensor& cast) {
  constexpr int64_t few = 1 << 20;
  const auto& value = weight.value();
  const bool small = value.is_cuda() && value.numel() <= few;
  return small || weight.kept(cast.scalar_type()).defined() ? cast : value;
}

}  // namespace

at::Tensor rows_of(const at::Tensor& x, const at::Tensor& weight) {
  return weight.dim() == 3 ? x.reshape({weight.size(0), -1, x.size(-1)}) : x.reshape({-1, x.size(-1)});
}

std::vector<int64_t> shape_with(const at::Tensor& x, int64_t features) {
  auto shape = x.sizes().vec();
  shape.back() = features;
  return shape;
}

const ops::Float8& Operand::float8() {
  if (!float8_) {
    const bool gradient = part_ == Part::gradient;
    float8_ = ops::to_float8(x_.reshape({-1, x_.size(-1)}), gradient ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn,
                             part_ != Part::input_again, part_ != Part::input);
  }
  return *float8_;
}

at::Tensor linear(Operand& x, const Weight& weight, const Weight& bias,
                  const std::optional<at::Tensor>& added, SavedWeight* saved) {
  const auto rows = x.rows(weight);
  const auto type = rows.scalar_type();
  if (rows.is_cpu() && saved == nullptr) {  // an answer
    const auto y = ops::linear_layer(rows, weight, bias);
    return added ? y + *added : y;
  }
  const auto w = weight.in(type);
  if (goes_in_float8(rows, weight)) {
    const auto narrow = ops::to_float8(w, at::kFloat8_e4m3fn, true, saved != nullptr);
    if (saved != nullptr) *saved = {narrow.columns, narrow.scale};
    ops::Float8ProductOptions options{.type = type, .fast_sums = true, .added = added};
    if (bias.defined()) options.bias = bias.in(type);
    return ops::float8_product(x.float8().rows, x.float8().scale, narrow.rows, narrow.scale, options);
  }
  if (saved != nullptr) *saved = {saved_cast(weight, w), {}};
  const auto turned = w.transpose(-2, -1);
  if (bias.defined())
    return ops::product_with_bias(rows, turned, bias.in(type), added.value_or(at::Tensor()));
  if (added && rows.is_cuda()) return ops::linear_add(rows, w, *added);
  const auto y = ops::product(rows, turned);
  return added ? y.add_(*added) : y;
}

void add_input_gradient(at::Tensor& dx, Operand& dy, const SavedWeight& weight, at::ScalarType type) {
  if (weight.scale.defined()) {
    ops::Float8ProductOptions options{.type = type};
    if (dx.defined()) options.added = dx;
    dx = ops::float8_product(dy.float8().rows, dy.float8().scale, weight.value, weight.scale, options);
    return;
  }
  const auto d = dy.rows(weight.value), w = weight.value.to(type);
  if (dx.defined()) {
    ops::add_product(dx, d, w);
  } else {
    dx = ops::product(d, w);
  }
}

at::Tensor weight_gradient(Operand& dy, Operand& x, const SavedWeight& weight, at::ScalarType type) {
  if (weight.scale.defined()) {
    const auto &d = dy.float8(), &in = x.float8();
    return ops::float8_product(d.columns, d.scale, in.columns, in.scale, {.type = type});
  }
  return ops::product(dy.rows(weight.value).transpose(-2, -1), x.rows(weight.value), type);
}

}  // namespace megalodon::model
