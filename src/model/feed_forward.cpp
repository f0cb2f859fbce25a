#include "model/feed_forward.h"

#include <ATen/ATen.h>

#include <cmath>

#include "model/gated_projection.h"
#include "model/recomputed.h"
#include "ops/layer_norm/layer_norm.h"
#include "ops/skinny_linear/skinny_linear.h"

namespace megalodon::model {

FeedForward::FeedForward(const MegalodonConfig& c, int64_t layer, ParameterMaker& make,
                         const std::string& name)
    : config(c) {
  const int64_t D = c.model_dim, F = c.ffn_hidden_dim;
  const auto matrix = [&](const std::string& part, int64_t out, int64_t in) {
    return make.weight(name + "." + part + ".weight", {out, in},
                       std::sqrt(1.0 / (3.0 * static_cast<double>(in))));
  };
  if (c.norm_affine) {
    norm_weight = make.constant(name + ".norm.weight", {D}, 0);
    norm_bias = make.constant(name + ".norm.bias", {D}, 0);
  }
  fc1 = matrix("fc1", F, D);
  fc2 = matrix("fc2", D, F);
  if (c.swiglu) {
    fc3 = matrix("fc3", F, D);
    Weight::lay_together({fc1, fc3});
  }
  if (c.rescale_nffn)
    alpha = make.constant(name + ".alpha", {D}, 0.1 * std::pow(0.5, static_cast<double>(layer)));
}

at::Tensor FeedForward::operator()(const at::Tensor& y, const at::Tensor& residual,
                                   const Place& place) const {
  auto* const dropout = place.dropout;
  if (dropout == nullptr && ops::has_skinny_kernel(y)) return step(y, residual);
  const auto weight = norm_weight.defined() ? std::optional(norm_weight) : std::nullopt;
  const auto bias = norm_bias.defined() ? std::optional(norm_bias) : std::nullopt;
  Recomputed anew(place.recomputes);
  const auto u = anew.add([=, eps = config.norm_eps] { return ops::layer_norm(y, weight, bias, eps); });
  const auto inner =
      fc3.defined() ? project_for_swiglu(u, fc1, fc3) : SwigluInputs{project(u, fc1), {}};  // [B, L, F]
  const auto gate = fc3.defined() ? std::optional(inner.b) : std::nullopt;
  const Drop drop_hidden(config.hidden_dropout, dropout);
  const Drop drop_out(config.dropout, dropout);
  if (drop_out.p() == 0 && !alpha.defined())
    return anew.until_gradient(
        project_swiglu(inner.a, gate, fc2, drop_hidden, {.added = residual, .hidden = inner.hidden}));
  auto out =
      drop_out(project_swiglu(inner.a, gate, fc2, drop_hidden, {.hidden = inner.hidden}));  // [B, L, D]
  if (alpha.defined()) out = out * alpha.to(out.scalar_type());
  return anew.until_gradient(residual + out);
}

at::Tensor FeedForward::step(const at::Tensor& y, const at::Tensor& residual) const {
  const auto hidden = ops::skinny_linear({{.x = y,
                                           .norm = ops::InputNorm::layer,
                                           .norm_weight = norm_weight,
                                           .norm_bias = norm_bias,
                                           .weight = fc1,
                                           .silu = true,
                                           .up = fc3}},
                                         config.norm_eps)[0];  // [B, L, F]
  if (!alpha.defined()) return ops::skinny_linear({{.x = hidden, .weight = fc2, .add = residual}})[0];
  return at::addcmul(residual, project(hidden, fc2), alpha.to(residual.scalar_type()));
}

}  // namespace megalodon::model
