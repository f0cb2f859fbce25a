#include "ops/add_rms_norm/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/column_sum/cuda.h"
#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kAlignment = 4;

at::Tensor pack_aligned(const Optional& x) {
  return x ? aligned(*x, kAlignment) : at::Tensor();
}

int64_t factor_count(const at::Tensor& factor) {
  return factor.dim() == 2 ? factor.size(0) : 1;
}

Triple forward(const at::Tensor& x, const Optional& added, const at::Tensor& factor, double eps,
               at::ScalarType type) {
  const auto D = x.size(-1), rows = x.numel() / D, K = factor_count(factor), each = rows / K;
  const auto x_ = pack_aligned(x), added_ = pack_aligned(added), factor_ = pack_aligned(factor);
  const auto sum = added ? at::empty_like(x_) : at::Tensor();
  const auto normal = at::empty_like(x_, x.options().dtype(type)), rstd = at::empty({rows}, x.options());
  launch_typed(normal, [&]<class T>(T*, cudaStream_t stream) {
    for (int64_t k = 0, first = 0; k < K; ++k, first += each) {
      cuda::add_rms_norm_forward(
          pointer<float>(x_) + first * D, added ? pointer<T>(added_) + first * D : nullptr,
          pointer<float>(factor_) + k * D, static_cast<float>(eps), each, D,
          added ? mutable_pointer<float>(sum) + first * D : nullptr, mutable_pointer<T>(normal) + first * D,
          mutable_pointer<float>(rstd) + first, stream);
    }
  });
  return {sum, normal, rstd};
}

Triple backward(const at::Tensor& sum, const at::Tensor& factor, const at::Tensor& rstd,
                const Optional& d_sum, const at::Tensor& d_normal, bool added) {
  const auto D = sum.size(-1), rows = sum.numel() / D, K = factor_count(factor), each = rows / K;
  const int64_t blocks = std::clamp<int64_t>(each / 8, 1, 512);
  const auto sum_ = pack_aligned(sum), factor_ = pack_aligned(factor), d_sum_ = pack_aligned(d_sum),
             d_normal_ = pack_aligned(d_normal);
  const auto dx = at::empty_like(sum_), d_factor = at::empty_like(factor_);
  const bool cast = added && d_normal.scalar_type() != at::kFloat;
  const auto d_added = cast ? at::empty_like(d_normal_) : added ? dx : at::Tensor();
  const auto partial = at::empty({blocks, D}, dx.options());
  launch_typed(d_normal, [&]<class T>(T*, cudaStream_t stream) {
    for (int64_t k = 0, first = 0; k < K; ++k, first += each) {
      cuda::add_rms_norm_backward(
          pointer<float>(sum_) + first * D, pointer<float>(factor_) + k * D, pointer<float>(rstd) + first,
          d_sum ? pointer<float>(d_sum_) + first * D : nullptr, pointer<T>(d_normal_) + first * D, each, D,
          blocks, mutable_pointer<float>(dx) + first * D,
          cast ? mutable_pointer<T>(d_added) + first * D : nullptr, mutable_pointer<float>(partial), stream);
      cuda::column_sums(pointer<float>(partial), blocks, D, blocks, mutable_pointer<float>(d_factor) + k * D,
                        stream);
    }
  });
  return {dx, d_added, d_factor};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("add_rms_norm_forward", &forward);
  m.impl("add_rms_norm_backward", &backward);
}

}  // namespace megalodon::ops
