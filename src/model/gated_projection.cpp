#include "model/gated_projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/linear_add/linear_add.h"
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
                 const Optional& added) {
  const auto rows = rows_of(drop(ops::swiglu(a, b)), weight);
  auto shape = a.sizes().vec();
  shape.back() = weight.size(-2);
  return (added ? ops::linear_add(rows, weight, rows_of(*added, weight))
                : product(rows, weight.transpose(-2, -1)))
      .view(shape);
}

struct GatedProjection : torch::autograd::Function<GatedProjection> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const Optional& b,
                            const at::Tensor& /*weight*/, const Drop& drop, const Optional& added,
                            const Optional& bias, const Weight& weight) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto cast = weight.in(a.scalar_type());
    ctx->save_for_backward({a, b.value_or(at::Tensor()), saved_weight(weight, cast)});
    ctx->saved_data["type"] = weight.value().scalar_type();
    ctx->saved_data["p"] = drop.p();
    ctx->saved_data["key"] = drop.key();
    ctx->saved_data["added"] = added.has_value();
    ctx->saved_data["biased"] = bias && bias->requires_grad();
    return value(a, b, cast, drop, added);
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
    return {da, db, d_weight, {}, ctx->saved_data["added"].toBool() ? dy[0] : at::Tensor(), d_bias, {}};
  }
};

}  // namespace

at::Tensor project_swiglu(const at::Tensor& a, const Optional& b, const Weight& weight, const Drop& drop,
                          const Optional& added, const Optional& bias) {
  if (!at::GradMode::is_enabled()) return value(a, b, weight.in(a.scalar_type()), drop, added);
  return GatedProjection::apply(a, b, weight.value(), drop, added, bias, weight);
}

}  // namespace megalodon::model
