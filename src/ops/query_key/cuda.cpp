#include "ops/query_key/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

cuda::QueryKeySizes sizes_of(const at::Tensor& z, int64_t chunk, double rope_base, double eps) {
  TORCH_CHECK(z.size(3) <= cuda::kMostQueryKeyFeatures, "[query_key] z: expected at most ",
              cuda::kMostQueryKeyFeatures, " features in a head on a CUDA device, got ", z.size(3));
  return {z.size(0), z.size(1), z.size(2), z.size(3), chunk, rope_base, eps};
}

Pair forward(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& start,
             int64_t chunk, double rope_base, double eps) {
  const auto z_ = aligned(z, 2), gamma_ = aligned(gamma, 2), beta_ = aligned(beta, 2);
  const auto start_ = start.contiguous(), q = at::empty_like(z_), k = at::empty_like(z_);
  launch_typed(z, [&]<class T>(T*, cudaStream_t stream) {
    cuda::query_key_forward(sizes_of(z, chunk, rope_base, eps), pointer<T>(z_), pointer<float>(gamma_),
                            pointer<float>(beta_), pointer<int64_t>(start_), mutable_pointer<T>(q),
                            mutable_pointer<T>(k), stream);
  });
  return {q, k};
}

Triple backward(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& start, int64_t chunk,
                double rope_base, double eps, const at::Tensor& dq, const at::Tensor& dk) {
  const auto z_ = aligned(z, 2), gamma_ = aligned(gamma, 2), start_ = start.contiguous();
  const auto dq_ = aligned(dq, 2), dk_ = aligned(dk, 2), d_z = at::empty_like(z_);
  // Two waves of the widest heads' blocks on 132 multiprocessors: what a block begins and ends with costs it
  // as much as a few tokens.
  const auto blocks =
      std::clamp<int64_t>(z.size(0) * z.size(1) / 8, 1, 528 / std::min<int64_t>(z.size(2), 64));
  const auto sums = at::empty({blocks, 2, 2, z.size(2) * z.size(3)}, gamma.options());
  launch_typed(z, [&]<class T>(T*, cudaStream_t stream) {
    cuda::query_key_backward(sizes_of(z, chunk, rope_base, eps), pointer<T>(z_), pointer<float>(gamma_),
                             pointer<int64_t>(start_), pointer<T>(dq_), pointer<T>(dk_), blocks,
                             mutable_pointer<T>(d_z), mutable_pointer<float>(sums), stream);
  });
  const auto d_parameters = sum_of_blocks(sums);
  return {d_z, d_parameters[0], d_parameters[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("query_key", &forward);
  m.impl("query_key_backward", &backward);
}

}  // namespace megalodon::ops
