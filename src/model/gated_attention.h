#pragma once
#include <array>
#include <optional>
#include <utility>

#include "model/layers.h"
#include "ops/cema_coefficients/cema_coefficients.h"

namespace megalodon::model {

// Timestep normalization with its parameters and its carried statistics.
struct TimestepNorm {
  at::Tensor weight, bias;  // [D]
  double eps;

  TimestepNorm(const MegalodonConfig& config, ParameterMaker& make, const std::string& name);
  // x [B, L, D]; the statistics are "LAYER.norm_{count,mean,var}" of the state, or "final_norm_*" where layer
  // < 0.
  at::Tensor operator()(const at::Tensor& x, const Place& place, int64_t layer) const;
  // The same, and x itself twice, for residuals (ops::timestep_norm_and_pass).
  std::array<at::Tensor, 3> and_pass(const at::Tensor& x, const Place& place, int64_t layer) const;
};

// Complex exponential moving average with the parameters of section 3.1 of arXiv 2404.08801.
struct Cema {
  at::Tensor alpha, delta;  // [D, N]
  at::Tensor theta;         // [D]
  at::Tensor gamma;         // [D, N, 2]: real and imaginary parts
  at::Tensor omega;         // [D]

  Cema(const MegalodonConfig& config, ParameterMaker& make, const std::string& name);
  // Where no gradient is wanted those of the last call, unless a parameter has changed.
  ops::CemaCoefficients coefficients() const;
  // x [B, L, D]; the state is "LAYER.cema" [B, D, N, 2].
  at::Tensor operator()(const at::Tensor& x, const ops::CemaCoefficients& coefficients, const Place& place,
                        int64_t layer) const;

 private:
  // The values of the parameters, by address and version.
  using Stamp = std::array<std::pair<const void*, int64_t>, 4>;
  mutable std::optional<std::pair<Stamp, ops::CemaCoefficients>> last_;
};

// The "mega" sub-block: normalized gated attention inside chunks (arXiv 2404.08801, section 3.3).
struct GatedAttention {
  MegalodonConfig config;
  int64_t layer;
  TimestepNorm timenorm;
  Cema cema;
  at::Tensor rmsnorm;      // [D], or undefined without norm_affine
  Weight wz, bz;           // [Z, D], [Z]
  Weight wv, bv;           // [E, D], [E]
  Weight wr, br;           // [E, D], [E]
  Weight wh1, bh1;         // [D, D], [D]
  Weight wh2;              // [D, E]
  at::Tensor gamma, beta;  // [2, Z]: row 0 for queries, row 1 for keys

  GatedAttention(const MegalodonConfig& c, int64_t layer_index, ParameterMaker& make,
                 const std::string& name);
  // [B, L, D] -> the same, and x again: the residual of what follows.
  std::pair<at::Tensor, at::Tensor> operator()(const at::Tensor& x, const Place& place) const;

 private:
  // One position of each stream, going on from a state: in few kernels, where there are kernels.
  at::Tensor step(const at::Tensor& x, const Place& place) const;
};

}  // namespace megalodon::model
