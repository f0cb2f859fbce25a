#include <ATen/ATen.h>

#include "ops/cema/cema.h"
#include "ops/norm_cema_step/norm_cema_step.h"

namespace megalodon::ops {

NormCemaResult norm_cema_step_reference(const at::Tensor& x, const NormCemaParameters& p,
                                        const TimestepNormState& state, const at::Tensor& h) {
  const auto norm = timestep_norm(x, p.weight, p.bias, state, {}, p.eps);
  const auto average = cema(norm.y, p.p, p.q, p.eta, p.omega, at::view_as_complex(h));
  state.mean.copy_(norm.state.mean);
  state.var.copy_(norm.state.var);
  h.copy_(at::view_as_real(average.h_last));
  return {norm.y, average.y, norm.state.count};
}

}  // namespace megalodon::ops
