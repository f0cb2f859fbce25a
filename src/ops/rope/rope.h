#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Rotary position embedding. The token t of row b is at position (start[b] + t) mod chunk (chunk 0: no
// modulus) and rotates the adjacent pairs (2i, 2i+1) of each head by position * base^(-2i/d). Angles come
// from float64. x [B, L, H, d] float32 or bfloat16 (float64 runs the reference), d even; start [B] int64.
// Differentiable in x. `inverse` rotates back.
at::Tensor rope(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base,
                bool inverse = false);

// The same in plain torch operations. Any device; float32 or float64.
at::Tensor rope_reference(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base,
                          bool inverse = false);

}  // namespace megalodon::ops
