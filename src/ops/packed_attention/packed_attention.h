#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Sequences of different lengths that lie one after the other in rows, without padding.
struct Sequences {
  // [S + 1] int32 from 0 to the number of rows, on the device of these: sequence i has the rows borders[i] ..
  // borders[i + 1] - 1. Some may be empty.
  at::Tensor borders;
  int64_t longest = 0;  // none has more rows
};

// Causal attention within each sequence: ops/attention/attention.h, without chunks and dropout.
// q [T, H, d], k [T, Hkv, d], v [T, Hkv, dv] float32 or bfloat16 (float64 runs the reference), H a multiple
// of Hkv. Returns o [T, H, dv]. Differentiable in q, k, v.
at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Sequences& sequences, double scale);

// The same in plain torch operations, one sequence after the other. Any device; float32 or float64.
at::Tensor packed_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const Sequences& sequences, double scale);

// Whether kernels take such heads; elsewhere the reference runs.
bool has_packed_kernel(at::Device device, at::ScalarType type, int64_t key_width, int64_t value_width);

}  // namespace megalodon::ops
