#include "ops/product_swiglu/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"
#include "ops/joined.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;

bool has_kernels(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  return cuda::has_product_swiglu();
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, bool factors,
                                           bool value) {
  const int64_t M = x.size(0), K = x.size(1), F = weight.size(0) / 2;
  const auto x_ = aligned(x, 8), weight_ = aligned(weight, 8);
  const auto both = factors ? at::empty({M, 2 * F}, x.options()) : at::Tensor();
  const auto y = value ? at::empty({M, F}, x.options()) : at::Tensor();
  launch(x, [&](cudaStream_t stream) {
    cuda::product_swiglu({.M = M,
                          .K = K,
                          .F = F,
                          .x = pointer<Bfloat16>(x_),
                          .weight = pointer<Bfloat16>(weight_),
                          .both = mutable_pointer<Bfloat16>(both),
                          .y = mutable_pointer<Bfloat16>(y)},
                         stream);
  });
  return {both, y};
}

// Whether the kernel takes the rows of [M, F] as they lie.
bool lies_well(const at::Tensor& x) {
  return x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) >= x.size(1) &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy,
                                                                    const at::Tensor& weight,
                                                                    const at::Tensor& a, const Optional& b,
                                                                    bool value, bool sums) {
  const int64_t M = dy.size(0), K = dy.size(1), F = weight.size(1);
  const auto dy_ = aligned(dy, 8), weight_ = aligned(weight, 8);
  const auto a_ = lies_well(a) ? a : aligned(a, 8);
  const auto b_ = !b ? at::Tensor() : lies_well(*b) ? *b : aligned(*b, 8);
  const auto made = b ? empty_like_joined({a_, b_}, 1) : empty_like_joined({a_}, 1);
  const auto &da = made[0], db = b ? made[1] : at::Tensor();
  const auto y = value ? at::empty({M, F}, a.options()) : at::Tensor();
  const auto partial =
      sums ? at::empty({cuda::product_swiglu_sums(M, K), F}, a.options().dtype(at::kFloat)) : at::Tensor();
  const auto step = [&](const at::Tensor& x) { return M > 1 ? x.stride(0) : F; };
  launch(dy, [&](cudaStream_t stream) {
    cuda::product_swiglu_gradients({.M = M,
                                    .K = K,
                                    .F = F,
                                    .dy = pointer<Bfloat16>(dy_),
                                    .weight = pointer<Bfloat16>(weight_),
                                    .a = pointer<Bfloat16>(a_),
                                    .b = pointer<Bfloat16>(b_),
                                    .a_step = step(a_),
                                    .b_step = b ? step(b_) : 0,
                                    .da = mutable_pointer<Bfloat16>(da),
                                    .db = mutable_pointer<Bfloat16>(db),
                                    .d_step = step(da),
                                    .y = mutable_pointer<Bfloat16>(y),
                                    .sums = mutable_pointer<float>(partial)},
                                   stream);
  });
  return {da, db, y, sums ? sum_of_blocks(partial) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("product_swiglu", &forward);
  m.impl("product_swiglu_backward", &backward);
  m.impl("has_product_swiglu", &has_kernels);
}

}  // namespace megalodon::ops
