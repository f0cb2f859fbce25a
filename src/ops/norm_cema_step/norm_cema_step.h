#pragma once
#include <ATen/core/Tensor.h>

#include "ops/timestep_norm/timestep_norm.h"

namespace megalodon::ops {

struct NormCemaParameters {
  at::Tensor weight, bias;  // of ops/timestep_norm/timestep_norm.h
  double eps;
  at::Tensor p, q, eta, omega;  // of ops/cema/cema.h
  // Whether neither state nor h is what the kernel launched last writes: a kernel reads them while that one
  // ends.
  bool early = false;
};

struct NormCemaResult {
  at::Tensor normal;  // [B, 1, D]: the timestep norm of x
  at::Tensor y;       // [B, 1, D]: the moving average of that
  at::Tensor count;   // [B]: that of the norm after the step
};

// One step of timestep norm and of the moving average behind it, without gradients. x [B, 1, D]; the state's
// mean and var and h [B, D, N, 2] float32, contiguous, are replaced by those after the step.
NormCemaResult norm_cema_step(const at::Tensor& x, const NormCemaParameters& parameters,
                              const TimestepNormState& state, const at::Tensor& h);

// The same with the two operators. Any device; float32, bfloat16 or float64.
NormCemaResult norm_cema_step_reference(const at::Tensor& x, const NormCemaParameters& parameters,
                                        const TimestepNormState& state, const at::Tensor& h);

}  // namespace megalodon::ops
