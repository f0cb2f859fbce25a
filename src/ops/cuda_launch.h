#pragma once
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

// f(stream) launches kernels on the device of x, on its current stream.
template <class F>
void launch(const at::Tensor& x, F&& f) {
  const c10::cuda::CUDAGuard guard(x.device());
  f(c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same with a null pointer of the element type of x: f(T*, stream), T float or Bfloat16.
template <class F>
void launch_typed(const at::Tensor& x, F&& f) {
  launch(x, [&](cudaStream_t stream) { with_element_type(x, [&](auto* type) { f(type, stream); }); });
}

// x contiguous, at an address that is a multiple of `elements` of its elements.
inline at::Tensor aligned(const at::Tensor& x, int64_t elements) {
  const auto x_ = x.contiguous();
  const auto bytes = static_cast<uintptr_t>(elements * x_.element_size());
  return reinterpret_cast<uintptr_t>(x_.const_data_ptr()) % bytes == 0 ? x_ : x_.clone();
}

// Blocks that share the rows of a matrix where each sums over its own: some waves on a large device.
inline int64_t row_blocks(int64_t rows) {
  return std::clamp<int64_t>(rows, 1, 1024);
}

// Blocks that share the rows of a matrix four at once, 16 bytes of a row a thread: those that run side by
// side on 132 multiprocessors.
inline int64_t row_tile_blocks(int64_t rows, int64_t row_bytes) {
  const int64_t threads = std::clamp<int64_t>((row_bytes + 511) / 512 * 32, 32, 768);
  return std::clamp<int64_t>((rows + 3) / 4, 1, 132 * (768 / threads));
}

// The gradients of query heads [..., H, d] that share a key head, summed: [..., Hkv, d].
inline at::Tensor sum_over_groups(const at::Tensor& x, int64_t Hkv) {
  if (x.size(-2) == Hkv) return x;
  return x.unflatten(-2, {Hkv, x.size(-2) / Hkv}).sum(-2, false, at::kFloat).to(x.scalar_type());
}

// Sums over the blocks of a kernel, [blocks, ...] float32: [...].
inline at::Tensor sum_of_blocks(const at::Tensor& partial) {
  static const auto column_sum = registered<at::Tensor(const at::Tensor&)>("megalodon::column_sum");
  return column_sum.call(partial.flatten(1)).view(partial.sizes().slice(1));
}

}  // namespace megalodon::ops
