#include "model/gated_projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/product.h"
#include "ops/swiglu/swiglu.h"

namespace megalodon::model {
namespace {
using ops::product;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// `weight` in the type of a.
at::Tensor value(const at::Tensor& a, const Optional& b, const at::Tensor& weight, const Drop& drop,
                 const Optional& onto) {
  const auto rows = rows_of(drop(ops::swiglu(a, b)), weight), w = weight.transpose(-2, -1);
  if (onto) {
    ops::add_product(rows_of(*onto, weight), rows, w);
    return *onto;
  }
  auto shape = a.sizes().vec();
  shape.back() = w.size(-1);
  return product(rows, w).view(shape);
}

struct GatedProjection : torch::autograd::Function<GatedProjection> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const Optional& b,
                            const at::Tensor& /*weight*/, const Drop& drop, const Optional& onto,
                            const Optional& bias, const Weight& weight) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto cast = weight.in(a.scalar_type());
    ctx->save_for_backward({a, b.value_or(at::Tensor()), saved_weight(weight, cast)});
    ctx->saved_data["type"] = weight.value().scalar_type();
    ctx->saved_data["p"] = drop.p();
    ctx->saved_data["key"] = drop.key();
    ctx->saved_data["onto"] = onto.has_value();
    ctx->saved_data["biased"] = bias && bias->requires_grad();
    if (onto) ctx->mark_dirty({*onto});
    return value(a, b, cast, drop, onto);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto &a = saved[0], &weight = saved[2];
    const auto b = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
    const Drop drop(ctx->saved_data["p"].toDouble(), ctx->saved_data["key"].toInt());
    const auto d = rows_of(dy[0], weight);
    const auto d_hidden = drop(product(d, weight.to(a.scalar_type())).view(a.sizes()));
    const auto [da, db, hidden, d_bias] =
        ops::swiglu_gradients(a, b, d_hidden, ctx->saved_data["biased"].toBool());
    const auto d_weight =
        product(d.transpose(-2, -1), rows_of(drop(hidden), weight), ctx->saved_data["type"].toScalarType());
    return {da, db, d_weight, {}, ctx->saved_data["onto"].toBool() ? dy[0] : at::Tensor(), d_bias, {}};
  }
};

}  // namespace

at::Tensor project_swiglu(const at::Tensor& a, const Optional& b, const Weight& weight, const Drop& drop,
                          const Optional& onto, const Optional& bias) {
  if (!at::GradMode::is_enabled()) return value(a, b, weight.in(a.scalar_type()), drop, onto);
  return GatedProjection::apply(a, b, weight.value(), drop, onto, bias, weight);
}

}  // namespace megalodon::model
