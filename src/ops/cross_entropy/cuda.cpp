#include "ops/cross_entropy/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cross_entropy/cross_entropy.h"
#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

at::Tensor forward(const at::Tensor& logits, const at::Tensor& targets) {
  const auto logits_ = logits.contiguous(), targets_ = targets.contiguous();
  const auto nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  launch_typed(logits, [&]<class E>(E*, cudaStream_t stream) {
    cuda::cross_entropy_forward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                                logits.size(0), logits.size(1), mutable_pointer<float>(nll), stream);
  });
  return nll;
}

at::Tensor backward(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& nll,
                    const at::Tensor& d_nll) {
  const auto logits_ = logits.contiguous(), targets_ = targets.contiguous(), d_nll_ = d_nll.contiguous();
  const auto d_logits = at::empty_like(logits_);
  launch_typed(logits, [&]<class E>(E*, cudaStream_t stream) {
    cuda::cross_entropy_backward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                                 pointer<float>(nll), pointer<float>(d_nll_), logits.size(0), logits.size(1),
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
