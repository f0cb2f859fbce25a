#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace megalodon::ops {

// What an AdamW step (Loshchilov and Hutter, 2019) changes: float32 tensors of one device, in lists of the
// same shapes.
struct AdamWTensors {
  std::vector<at::Tensor> parameters, first_moments, second_moments;
  at::Tensor steps;  // how many were taken before, a float32 number
  // For each parameter a bfloat16 tensor to hold its values too, or one without elements.
  std::vector<at::Tensor> rounded = {};
};
struct AdamWConstants {
  double beta1, beta2, eps, weight_decay;
};

// A step by gradients / divisors, unless `skip` is 1 (0 otherwise). Of the divisors [K] each is for its K-th
// of every gradient. rate is a number, float64 on a CPU and float32 elsewhere; all are on the parameters'
// device, which is not waited for. The gradients' values are undefined afterwards.
void adamw(const AdamWTensors& tensors, at::TensorList gradients, const at::Tensor& divisors,
           const at::Tensor& rate, const at::Tensor& skip, const AdamWConstants& constants);

// By torch's.
void adamw_reference(const AdamWTensors& tensors, at::TensorList gradients, const at::Tensor& divisors,
                     const at::Tensor& rate, const at::Tensor& skip, const AdamWConstants& constants);

}  // namespace megalodon::ops
