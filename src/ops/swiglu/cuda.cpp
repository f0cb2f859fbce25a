#include "ops/swiglu/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

at::Tensor forward(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor(), y = at::empty_like(a_);
  launch_typed(a, [&]<class T>(T*, cudaStream_t stream) {
    cuda::swiglu_forward(pointer<T>(a_), pointer<T>(b_), mutable_pointer<T>(y), a_.numel(), stream);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& a,
                                                        const std::optional<at::Tensor>& b,
                                                        const at::Tensor& dy, bool value) {
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor(), dy_ = dy.contiguous();
  const auto da = at::empty_like(a_), db = b ? at::empty_like(b_) : at::Tensor(),
             y = value ? at::empty_like(a_) : at::Tensor();
  launch_typed(a, [&]<class T>(T*, cudaStream_t stream) {
    cuda::swiglu_backward(pointer<T>(a_), pointer<T>(b_), pointer<T>(dy_), mutable_pointer<T>(da),
                          mutable_pointer<T>(db), mutable_pointer<T>(y), a_.numel(), stream);
  });
  return {da, db, y};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("swiglu", &forward);
  m.impl("swiglu_backward", &backward);
}

}  // namespace megalodon::ops
