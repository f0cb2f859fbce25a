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

// As backward_cpu of swiglu.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& a,
                                                                    const std::optional<at::Tensor>& b,
                                                                    const at::Tensor& dy, bool value,
                                                                    bool sums) {
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor(), dy_ = dy.contiguous();
  const auto da = at::empty_like(a_), db = b ? at::empty_like(b_) : at::Tensor(),
             y = value ? at::empty_like(a_) : at::Tensor();
  const int64_t F = sums ? a.size(-1) : 1, R = a.numel() / std::max<int64_t>(F, 1);
  // Blocks that sum their rows: what runs side by side on 132 multiprocessors.
  const int64_t across = (F * a.element_size() + 4095) / 4096,
                rows = std::max<int64_t>(1, (R * across + 527) / 528);
  const auto partial =
      sums ? at::empty({(R + rows - 1) / rows, F}, a.options().dtype(at::kFloat)) : at::Tensor();
  launch_typed(a, [&]<class T>(T*, cudaStream_t stream) {
    const cuda::SwigluGradient<T> x{pointer<T>(a_),         pointer<T>(b_),         pointer<T>(dy_),
                                    mutable_pointer<T>(da), mutable_pointer<T>(db), mutable_pointer<T>(y)};
    if (sums) {
      cuda::swiglu_backward_with_sums(x, R, F, rows, mutable_pointer<float>(partial), stream);
    } else {
      cuda::swiglu_backward(x, a_.numel(), stream);
    }
  });
  return {da, db, y, sums ? sum_of_blocks(partial) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("swiglu", &forward);
  m.impl("swiglu_backward", &backward);
}

}  // namespace megalodon::ops
