#include "ops/cross_entropy/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cross_entropy/cross_entropy.h"
#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

cuda::LogitRows rows_of(const at::Tensor& logits, int64_t padding) {
  return {logits.size(0), logits.size(1) - padding, logits.size(1)};
}

at::Tensor forward(const at::Tensor& logits, const at::Tensor& targets, int64_t padding) {
  const auto logits_ = logits.contiguous(), targets_ = targets.contiguous();
  const auto nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  launch_typed(logits, [&]<class E>(E*, cudaStream_t stream) {
    cuda::cross_entropy_forward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                                rows_of(logits, padding), mutable_pointer<float>(nll), stream);
  });
  return nll;
}

at::Tensor backward(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& nll,
                    const at::Tensor& d_nll, int64_t padding) {
  const auto logits_ = logits.contiguous(), targets_ = targets.contiguous(), d_nll_ = d_nll.contiguous();
  const auto d_logits = at::empty_like(logits_);
  launch_typed(logits, [&]<class E>(E*, cudaStream_t stream) {
    cuda::cross_entropy_backward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                                 pointer<float>(nll), pointer<float>(d_nll_), rows_of(logits, padding),
                                 mutable_pointer<E>(d_logits), stream);
  });
  return d_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cross_entropy", &forward);
  m.impl("cross_entropy_backward", &backward);
}

}  // namespace megalodon::ops
