#include "model/gated_projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "model/linear_products.h"
#include "ops/swiglu/swiglu.h"

namespace megalodon::model {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

at::Tensor value(const at::Tensor& a, const Optional& b, const Weight& weight, const Drop& drop,
                 const Optional& added, SavedWeight* saved = nullptr) {
  Operand hidden(drop(ops::swiglu(a, b)), Operand::Part::input);
  auto shape = a.sizes().vec();
  shape.back() = weight.value().size(-2);
  const auto onto = added ? Optional(rows_of(*added, weight)) : std::nullopt;
  return linear(hidden, weight, {}, onto, saved).view(shape);
}

struct GatedProjection : torch::autograd::Function<GatedProjection> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const Optional& b,
                            const at::Tensor& /*weight*/, const Drop& drop, const Optional& added,
                            const Optional& bias, const Weight& weight) {
    const at::AutoDispatchBelowADInplaceOrView below;
    SavedWeight saved;
    const auto y = value(a, b, weight, drop, added, &saved);
    ctx->save_for_backward({a, b.value_or(at::Tensor()), saved.value, saved.scale});
    ctx->saved_data["type"] = weight.value().scalar_type();
    ctx->saved_data["p"] = drop.p();
    ctx->saved_data["key"] = drop.key();
    ctx->saved_data["added"] = added.has_value();
    ctx->saved_data["biased"] = bias && bias->requires_grad();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto& a = saved[0];
    const SavedWeight weight{saved[2], saved[3]};
    const auto b = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
    const Drop drop(ctx->saved_data["p"].toDouble(), ctx->saved_data["key"].toInt());
    Operand d(dy[0], Operand::Part::gradient);
    at::Tensor d_rows;
    add_input_gradient(d_rows, d, weight, a.scalar_type());
    const auto [da, db, value, d_bias] =
        ops::swiglu_gradients(a, b, drop(d_rows.view(a.sizes())), ctx->saved_data["biased"].toBool());
    Operand hidden(drop(value), Operand::Part::input_again);
    const auto d_weight = weight_gradient(d, hidden, weight, ctx->saved_data["type"].toScalarType());
    return {da, db, d_weight, {}, ctx->saved_data["added"].toBool() ? dy[0] : at::Tensor(), d_bias, {}};
  }
};

}  // namespace

at::Tensor project_swiglu(const at::Tensor& a, const Optional& b, const Weight& weight, const Drop& drop,
                          const Optional& added, const Optional& bias) {
  if (!at::GradMode::is_enabled()) return value(a, b, weight, drop, added);
  return GatedProjection::apply(a, b, weight.value(), drop, added, bias, weight);
}

}  // namespace megalodon::model
