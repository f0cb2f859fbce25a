#include "model/gated_projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "model/linear_products.h"
#include "ops/product_swiglu/product_swiglu.h"
#include "ops/swiglu/swiglu.h"

namespace megalodon::model {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

at::Tensor value(const at::Tensor& dropped, const Weight& weight, const Optional& added,
                 SavedWeight* saved = nullptr) {
  Operand hidden(dropped, Operand::Part::input);
  const auto onto = added ? Optional(rows_of(*added, weight)) : std::nullopt;
  return linear(hidden, weight, {}, onto, saved).view(shape_with(dropped, weight.value().size(-2)));
}

// Of swiglu(a, b) from the gradient of drop(that) W^T; with its value again where `again`.
ops::SwigluGradients gradients(Operand& dy, const SavedWeight& weight, const at::Tensor& a, const Optional& b,
                               const Drop& drop, bool biased, bool again) {
  const auto type = a.scalar_type();
  if (drop.p() == 0 && !weight.scale.defined()) {
    const auto rows = [&](const at::Tensor& x) { return rows_of(x, weight.value); };
    return ops::product_swiglu_gradients(dy.rows(weight.value), weight.value.to(type), rows(a),
                                         b ? Optional(rows(*b)) : std::nullopt, biased, again);
  }
  at::Tensor d;
  add_input_gradient(d, dy, weight, type);
  return ops::swiglu_gradients(a, b, drop(d.view(a.sizes())), biased, again);
}

struct GatedProjection : torch::autograd::Function<GatedProjection> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const Optional& b,
                            const at::Tensor& /*weight*/, const Drop& drop, const Optional& added,
                            const Optional& bias, const Weight& weight, const SwigluOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    SavedWeight saved;
    const auto hidden = options.hidden.defined() ? options.hidden : ops::swiglu(a, b);
    if (options.product.defined()) saved.value = options.product.weight;
    const auto y = options.product.defined() ? options.product.placeholder()
                                             : value(drop(hidden), weight, added, &saved);
    ctx->save_for_backward({a, b.value_or(at::Tensor()), saved.value, saved.scale,
                            options.keeps_hidden ? hidden : at::Tensor()});
    ctx->saved_data["type"] = weight.value().scalar_type();
    ctx->saved_data["p"] = drop.p();
    ctx->saved_data["key"] = drop.key();
    ctx->saved_data["added"] = added.has_value();
    ctx->saved_data["biased"] = bias && bias->requires_grad();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto &a = saved[0], &kept = saved[4];
    const SavedWeight weight{saved[2], saved[3]};
    const auto b = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
    const Drop drop(ctx->saved_data["p"].toDouble(), ctx->saved_data["key"].toInt());
    Operand d(dy[0], Operand::Part::gradient);
    const auto [da, db, again, d_bias] =
        gradients(d, weight, a, b, drop, ctx->saved_data["biased"].toBool(), !kept.defined());
    Operand hidden(drop(kept.defined() ? kept : again), Operand::Part::input_again);
    const auto d_weight = weight_gradient(d, hidden, weight, ctx->saved_data["type"].toScalarType());
    return {da.view(a.sizes()),
            b ? db.view(a.sizes()) : db,
            d_weight,
            {},
            ctx->saved_data["added"].toBool() ? dy[0] : at::Tensor(),
            d_bias,
            {},
            {}};
  }
};

}  // namespace

at::Tensor project_swiglu(const at::Tensor& a, const Optional& b, const Weight& weight, const Drop& drop,
                          const SwigluOptions& options) {
  if (!at::GradMode::is_enabled()) {
    const auto dropped = drop(options.hidden.defined() ? options.hidden : ops::swiglu(a, b));
    return options.added ? value(dropped, weight, options.added) : project(dropped, weight);
  }
  return GatedProjection::apply(a, b, weight.value(), drop, options.added, options.bias, weight, options);
}

}  // namespace megalodon::model
