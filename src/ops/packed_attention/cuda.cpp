#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/attention/cuda_heads.h"

// Narrow heads of short sequences have kernels of their own (ops/attention/cuda_small.cu); others go through
// torch's flash attention.
namespace megalodon::ops {
namespace {
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

bool is_small(const at::Tensor& q, int64_t longest) {
  const c10::cuda::CUDAGuard guard(q.device());
  return cuda::has_small_kernels(q.size(2), longest);
}

cuda::SmallSizes small_sizes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& borders,
                             int64_t longest, double scale) {
  return {.count = borders.numel() - 1,
          .length = longest,
          .first = 0,
          .step = 0,
          .H = q.size(1),
          .Hkv = k.size(1),
          .width = q.size(2),
          .scale = static_cast<float>(scale),
          .borders = pointer<int32_t>(borders)};
}

// o, and the logarithms of the softmax's denominators: [T, H], or as torch's flash attention has them.
Pair forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& borders,
             int64_t longest, double scale) {
  const auto q_ = in_rows(q), k_ = in_rows(k), v_ = in_rows(v), borders_ = borders.contiguous();
  if (q.numel() > 0 && !is_small(q, longest)) {
    const auto result =
        at::_flash_attention_forward(q_, k_, v_, borders_, borders_, longest, longest, 0, true, false, scale);
    return {std::get<0>(result), std::get<1>(result)};
  }
  const auto o = at::empty(q.sizes(), q.options());
  const auto lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  if (q.numel() == 0) return {o, lse};
  launch(q, [&](cudaStream_t stream) {
    cuda::small_forward(small_sizes(q, k, borders_, longest, scale),
                        {small_heads(q_), small_heads(k_), small_heads(v_)}, mutable_pointer<Bfloat16>(o),
                        mutable_pointer<float>(lse), stream);
  });
  return {o, lse};
}

Triple backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& borders,
                const at::Tensor& o, const at::Tensor& lse, const at::Tensor& d_o, int64_t longest,
                double scale) {
  if (q.numel() == 0) return {at::zeros_like(q), at::zeros_like(k), at::zeros_like(v)};
  const auto q_ = in_rows(q), k_ = in_rows(k), v_ = in_rows(v), d_o_ = aligned(d_o, 8);
  const auto borders_ = borders.contiguous();
  if (!is_small(q, longest)) {
    const auto no_dropout = at::empty({2}, q.options().dtype(at::kLong));
    return at::_flash_attention_backward(d_o_, q_, k_, v_, o, lse, borders_, borders_, longest, longest, 0,
                                         true, no_dropout, no_dropout, scale);
  }
  const auto made = gradients_of_heads(k_, v_, q_);
  const auto &dk = made[0], &dv = made[1], &dq = made[2];
  launch(q, [&](cudaStream_t stream) {
    cuda::small_backward(small_sizes(q, k, borders_, longest, scale),
                         {small_heads(q_), small_heads(k_), small_heads(v_)}, pointer<Bfloat16>(o),
                         pointer<float>(lse), pointer<Bfloat16>(d_o_),
                         {mutable_small_heads(dq), mutable_small_heads(dk), mutable_small_heads(dv)}, stream);
  });
  return {dq, sum_over_groups(dk, k.size(1)), sum_over_groups(dv, k.size(1))};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("packed_attention_forward", &forward);
  m.impl("packed_attention_backward", &backward);
}

}  // namespace megalodon::ops
