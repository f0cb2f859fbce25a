#pragma once
#include <ATen/ATen.h>

#include "ops/attention/cuda.h"
#include "ops/cuda_launch.h"
#include "ops/joined.h"

// Queries, keys and values [..., heads, d], bfloat16, that may be columns of one tensor.
namespace megalodon::ops {

// The elements from position to position.
inline int64_t row_of_heads(const at::Tensor& x) {
  return x.flatten(0, -3).stride(0);
}

// x itself where its positions are rows of neighbouring heads, at one distance and multiples of 16 bytes;
// else a copy.
inline at::Tensor in_rows(const at::Tensor& x) {
  const auto rows = x.flatten(0, -3);
  const bool together = rows.stride(2) == 1 && (rows.size(1) == 1 || rows.stride(1) == rows.size(2));
  const bool packed = rows.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return rows.is_alias_of(x) && together && packed ? x : aligned(x, 8);
}

// What cuda::small_forward and _backward take.
inline cuda::SmallHeads<const Bfloat16> small_heads(const at::Tensor& x) {
  return {pointer<Bfloat16>(x), row_of_heads(x)};
}
inline cuda::SmallHeads<Bfloat16> mutable_small_heads(const at::Tensor& x) {
  return {mutable_pointer<Bfloat16>(x), row_of_heads(x)};
}

// Uninitialised gradients of k, v and q for each query head: where these are columns of one tensor, in that
// order, and no heads share keys, so are the gradients.
inline std::vector<at::Tensor> gradients_of_heads(const at::Tensor& k, const at::Tensor& v,
                                                  const at::Tensor& q) {
  if (q.size(-2) == k.size(-2)) return empty_like_joined({k, v, q}, -2);
  const auto of_queries = [&](const at::Tensor& x) {
    auto sizes = q.sizes().vec();
    sizes.back() = x.size(-1);
    return at::empty(sizes, x.options());
  };
  return {of_queries(k), of_queries(v), of_queries(q)};
}

}  // namespace megalodon::ops
