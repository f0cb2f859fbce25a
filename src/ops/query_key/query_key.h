#pragma once
#include <ATen/core/Tensor.h>
#include <utility>

namespace megalodon::ops {

// Queries and keys of normalized attention from the shared representation z (arXiv 2404.08801, section 3.3):
//   z' = z / sqrt(mean(z^2) + eps) for each head,
//   q = rope(z' (1 + gamma_q)/sqrt(dz) + beta_q),   k = rope(z' (1 + gamma_k)/sqrt(dz) + beta_k),
// rope at positions (start[b] + t) mod chunk (ops/rope/rope.h).
// z [B, L, H, dz] float32 or bfloat16 (float64 runs the reference); gamma, beta [2, H*dz] float32, row 0 for
// q, row 1 for k, head-major; start [B] int64. Returns q, k [B, L, H, dz] in the dtype of z. Differentiable
// in z, gamma, beta.
std::pair<at::Tensor, at::Tensor> query_key(const at::Tensor& z, const at::Tensor& gamma,
                                            const at::Tensor& beta, const at::Tensor& start, int64_t chunk,
                                            double rope_base, double eps = 1e-5);

// The same in plain torch operations. Any device; float32 or float64.
std::pair<at::Tensor, at::Tensor> query_key_reference(const at::Tensor& z, const at::Tensor& gamma,
                                                      const at::Tensor& beta, const at::Tensor& start,
                                                      int64_t chunk, double rope_base, double eps = 1e-5);

}  // namespace megalodon::ops
