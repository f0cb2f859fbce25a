#include "model/gated_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "model/gated_projection.h"
#include "model/recomputed.h"
#include "ops/attention_step/attention_step.h"
#include "ops/cema/cema.h"
#include "ops/norm_cema_step/norm_cema_step.h"
#include "ops/query_key/query_key.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/skinny_linear/skinny_linear.h"
#include "ops/swiglu/swiglu.h"
#include "ops/timestep_norm/timestep_norm.h"

namespace megalodon::model {

TimestepNorm::TimestepNorm(const MegalodonConfig& config, ParameterMaker& make, const std::string& name)
    : weight(make.constant(name + ".weight", {config.model_dim}, 0)),
      bias(make.constant(name + ".bias", {config.model_dim}, 0)),
      eps(config.norm_eps) {}

at::Tensor TimestepNorm::operator()(const at::Tensor& x, const Place& place, int64_t layer) const {
  if (place.state == nullptr) return ops::timestep_norm(x, weight, bias, place.fresh_norm, {}, eps).y;
  const std::string name = layer < 0 ? "final_norm_" : std::to_string(layer) + ".norm_";
  auto& tensors = place.state->tensors;
  auto& count = tensors.at(name + "count");
  auto& mean = tensors.at(name + "mean");
  auto& var = tensors.at(name + "var");
  auto result = ops::timestep_norm(x, weight, bias, {count, mean, var}, {}, eps);
  count = result.state.count;
  mean = result.state.mean;
  var = result.state.var;
  return result.y;
}

std::array<at::Tensor, 3> TimestepNorm::and_pass(const at::Tensor& x, const Place& place,
                                                 int64_t layer) const {
  if (place.state != nullptr) return {(*this)(x, place, layer), x, x};
  const auto [result, first, second] = ops::timestep_norm_and_pass(x, weight, bias, place.fresh_norm, eps);
  return {result.y, first, second};
}

Cema::Cema(const MegalodonConfig& config, ParameterMaker& make, const std::string& name) {
  const int64_t D = config.model_dim, N = config.cema_ndim;
  alpha = make.normal(name + ".alpha", {D, N}, 0.2);
  delta = make.normal(name + ".delta", {D, N}, 0.2);
  theta = make.custom(name + ".theta", {D}, [&](const at::Generator& g) {
    const auto f = at::exp(at::arange(1, D + 1, at::kDouble) *
                           (-std::log(static_cast<double>(D)) / static_cast<double>(D)));
    return at::logit(f).index_select(0, at::randperm(D, g));
  });
  gamma = make.custom(name + ".gamma", {D, N, 2}, [&](const at::Generator& g) {
    return at::stack({at::randn({D, N}, g), at::zeros({D, N})}, -1);
  });
  omega = make.truncated_normal(name + ".omega", {D}, 0.25, 1.0);
}

ops::CemaCoefficients Cema::coefficients() const {
  const auto computed = [&] { return ops::cema_coefficients(alpha, delta, theta, gamma); };
  if (at::GradMode::is_enabled()) return computed();
  Stamp now;
  std::size_t i = 0;
  for (const auto* parameter : {&alpha, &delta, &theta, &gamma})
    now[i++] = {parameter->const_data_ptr(), static_cast<int64_t>(parameter->_version())};
  if (!last_ || last_->first != now) last_.emplace(now, computed());
  return last_->second;
}

at::Tensor Cema::operator()(const at::Tensor& x, const ops::CemaCoefficients& c, const Place& place,
                            int64_t layer) const {
  const auto& [p, q, eta] = c;
  if (place.state == nullptr) return ops::cema(x, p, q, eta, omega).y;
  auto& h = place.state->layer(layer, "cema");  // [B, D, N, 2]
  auto result = ops::cema(x, p, q, eta, omega, at::view_as_complex(h));
  h = at::view_as_real(result.h_last);
  return result.y;
}

GatedAttention::GatedAttention(const MegalodonConfig& c, int64_t layer_index, ParameterMaker& make,
                               const std::string& name)
    : config(c), layer(layer_index), timenorm(c, make, name + ".timenorm"), cema(c, make, name + ".cema") {
  const int64_t D = c.model_dim, Z = c.z_dim, E = c.value_dim;
  const auto matrix = [&](const std::string& part, int64_t out, int64_t in) {
    return make.weight(name + "." + part + ".weight", {out, in},
                       std::sqrt(1.0 / (3.0 * static_cast<double>(in))));
  };
  const auto zeros = [&](const std::string& part, at::IntArrayRef shape) {
    return make.constant(name + "." + part, shape, 0);
  };
  if (c.norm_affine) rmsnorm = zeros("rmsnorm.weight", {D});
  wz = matrix("wz", Z, D);
  bz = make.bias(name + ".wz.bias", {Z});
  wv = matrix("wv", E, D);
  bv = make.bias(name + ".wv.bias", {E});
  wr = matrix("wr", E, D);
  br = make.bias(name + ".wr.bias", {E});
  wh1 = matrix("wh1", D, D);
  bh1 = make.bias(name + ".wh1.bias", {D});
  wh2 = matrix("wh2", D, E);
  Weight::lay_together({wz, wr, wh1});
  gamma = zeros("gamma", {2, Z});
  beta = zeros("beta", {2, Z});
}

std::pair<at::Tensor, at::Tensor> GatedAttention::operator()(const at::Tensor& x, const Place& place) const {
  if (place.state != nullptr && place.dropout == nullptr && x.size(1) == 1 && ops::has_skinny_kernel(x))
    return {step(x, place), x};
  Recomputed anew(place.recomputes);
  const auto [x_n, residual, next_residual] = timenorm.and_pass(x, place, layer);
  anew.add(x_n, [=, norm = timenorm, index = layer] { return norm(x, place, index); });
  const auto coefficients = cema.coefficients();  // not by the kernel just before cema's, which starts early
  // The biases of what goes through SiLU have their gradients with it.
  const auto of_x_n = project_and_pass(x_n, {{wv, bv.detached()}});
  const auto& of_v = of_x_n[0];                                       // [B, L, E]
  const auto smoothed = cema(of_x_n[1], coefficients, place, layer);  // [B, L, D], as x_n and mx
  const auto scale = rmsnorm.defined() ? std::optional(rmsnorm) : std::nullopt;
  const Drop drop_mx(config.hidden_dropout, place.dropout);
  const auto mx =
      anew.add([=, eps = config.norm_eps] { return drop_mx(ops::rms_norm(smoothed, scale, eps)); });
  const bool drops = place.dropout != nullptr && config.dropout > 0;
  const auto of_mx =
      project(mx, {{wz, bz}, {wr, br.detached()}, {wh1, bh1, drops ? at::Tensor() : residual}});
  const auto z = of_mx[0].unflatten(-1, {config.num_heads, -1});  // [B, L, H, dz]
  const auto v = anew.add([=, bias = bv.value()] { return ops::swiglu(of_v, {}, bias); })
                     .unflatten(-1, {config.num_heads, -1});  // [B, L, H, dv]
  const auto qk = anew.add([=, start = place.start, c = config, g = gamma, b = beta] {
    const auto [q, k] = ops::query_key(z, g, b, start, c.chunk_size, c.rope_base, c.norm_eps);
    return std::vector{q, k};
  });
  const auto o = attend(qk[0], qk[1], v, {.chunk = config.chunk_size}, config.attention_dropout, place,
                        layer);  // [B, L, E]
  const Drop drop_gated(config.hidden_dropout, place.dropout);
  const auto h =
      project_swiglu(of_mx[1], o, wh2, drop_gated, {.added = of_mx[2], .bias = br.value()});  // [B, L, D]
  const auto y = drops ? residual + drop(h, config.dropout, place.dropout) : h;
  return {anew.until_gradient(y), next_residual};
}

at::Tensor GatedAttention::step(const at::Tensor& x, const Place& place) const {
  const auto state = [&](const char* name) -> at::Tensor& { return place.state->layer(layer, name); };
  const auto heads = [&](const at::Tensor& t) { return t.unflatten(-1, {config.num_heads, -1}); };
  const auto [p, q, eta] = cema.coefficients();
  // What was launched last made x or moved the position: states are as they will be read.
  const auto [x_n, smoothed, count] = ops::norm_cema_step(
      x, {timenorm.weight, timenorm.bias, timenorm.eps, p, q, eta, cema.omega, /*early=*/true},
      {state("norm_count"), state("norm_mean"), state("norm_var")}, state("cema"));
  state("norm_count") = count;
  const ops::SkinnyLayer of_mx{.x = smoothed, .norm = ops::InputNorm::rms, .norm_weight = rmsnorm};
  auto of_z = of_mx, of_r = of_mx, of_h = of_mx;
  of_z.weight = wz, of_z.bias = bz;
  of_r.weight = wr, of_r.bias = br, of_r.silu = true;
  of_h.weight = wh1, of_h.bias = bh1, of_h.add = x;
  const auto y = ops::skinny_linear({{.x = x_n, .weight = wv, .bias = bv, .silu = true}, of_z, of_r, of_h},
                                    config.norm_eps);
  const auto gated =
      ops::attention_step(heads(y[1]), {gamma, beta, config.chunk_size, config.rope_base, config.norm_eps},
                          heads(y[0]), y[2], place.start, {state("k"), state("v")});  // [B, 1, E]
  return ops::skinny_linear({{.x = gated, .weight = wh2, .add = y[3]}})[0];
}

}  // namespace megalodon::model
