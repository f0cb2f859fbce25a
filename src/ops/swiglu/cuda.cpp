#include "ops/swiglu/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"
#include "ops/joined.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;

// a and b as [R, F], rows of both at one distance: where they lie so, not copied.
struct Inputs {
  at::Tensor a, b;

  Inputs(const at::Tensor& a_, const Optional& b_) {
    const int64_t F = a_.dim() > 0 ? a_.size(-1) : 1;
    a = a_.reshape({-1, F});
    if (b_) b = b_->reshape({-1, F});
    if (a.stride(1) == 1 && (!b_ || b.strides() == a.strides())) return;
    a = a.contiguous();
    if (b_) b = b.contiguous();
  }
  template <class T>
  cuda::SwigluInputs<T> pointers() const {
    return {pointer<T>(a), pointer<T>(b), a.size(0), a.size(1), a.size(0) > 1 ? a.stride(0) : a.size(1)};
  }
};

at::Tensor forward(const at::Tensor& a, const Optional& b) {
  const auto y = at::empty(a.sizes(), a.options());
  if (a.numel() == 0) return y;
  const Inputs x(a, b);
  launch_typed(a, [&]<class T>(T*, cudaStream_t stream) {
    cuda::swiglu_forward(x.pointers<T>(), mutable_pointer<T>(y), stream);
  });
  return y;
}

// As backward_cpu of swiglu.cpp; da and db are columns of one tensor where a and b are.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& a, const Optional& b,
                                                                    const at::Tensor& dy, bool value,
                                                                    bool sums) {
  const auto y = value ? at::empty(a.sizes(), a.options()) : at::Tensor();
  if (a.numel() == 0) {
    return {at::empty_like(a), b ? at::empty_like(a) : at::Tensor(), y,
            sums ? at::zeros({a.size(-1)}, a.options().dtype(at::kFloat)) : at::Tensor()};
  }
  const Inputs x(a, b);
  const auto dy_ = dy.contiguous();
  const auto made = b ? empty_like_joined({x.a, x.b}, 1) : empty_like_joined({x.a}, 1);
  const auto &da = made[0], db = b ? made[1] : at::Tensor();
  const int64_t R = x.a.size(0), F = x.a.size(1);
  // Blocks that sum their rows: what runs side by side on 132 multiprocessors.
  const int64_t across = (F * a.element_size() + 4095) / 4096,
                rows = std::max<int64_t>(1, (R * across + 527) / 528);
  const auto partial =
      sums ? at::empty({(R + rows - 1) / rows, F}, a.options().dtype(at::kFloat)) : at::Tensor();
  launch_typed(a, [&]<class T>(T*, cudaStream_t stream) {
    const cuda::SwigluGradients<T> d{pointer<T>(dy_), mutable_pointer<T>(da), mutable_pointer<T>(db),
                                     mutable_pointer<T>(y), R > 1 ? da.stride(0) : F};
    if (sums) {
      cuda::swiglu_backward_with_sums(x.pointers<T>(), d, rows, mutable_pointer<float>(partial), stream);
    } else {
      cuda::swiglu_backward(x.pointers<T>(), d, stream);
    }
  });
  return {da.view(a.sizes()), b ? db.view(a.sizes()) : db, y, sums ? sum_of_blocks(partial) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("swiglu", &forward);
  m.impl("swiglu_backward", &backward);
}

}  // namespace megalodon::ops
