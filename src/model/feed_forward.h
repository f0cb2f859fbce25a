#pragma once
#include "model/layers.h"

namespace megalodon::model {

// The feed-forward sub-block with the two-hop residual (arXiv 2404.08801, section 3.4).
struct FeedForward {
  MegalodonConfig config;
  at::Tensor norm_weight, norm_bias;  // [D], or undefined without norm_affine
  Weight fc1, fc2, fc3;               // [F, D], [D, F], and with SwiGLU [F, D]
  at::Tensor alpha;                   // [D]: layer scale, or undefined

  FeedForward(const MegalodonConfig& c, int64_t layer, ParameterMaker& make, const std::string& name);
  // residual + FFN(LayerNorm(y)); y, residual [B, L, D]. The residual is the block's input, not y.
  at::Tensor operator()(const at::Tensor& y, const at::Tensor& residual, const Place& place) const;

 private:
  // Of few rows, where no gradient is wanted.
  at::Tensor step(const at::Tensor& y, const at::Tensor& residual) const;
};

}  // namespace megalodon::model
