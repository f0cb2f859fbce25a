#include "ops/column_sum/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

// In two steps where rows are many: blocks of rows, then over the blocks.
at::Tensor sum_of_rows(const at::Tensor& x) {
  const int64_t R = x.size(0), D = x.size(1);
  const auto number = x.options().dtype(at::kFloat);
  if (x.numel() == 0) return at::zeros({D}, number);
  const int64_t rows = std::max<int64_t>(128, (R + 1023) / 1024), blocks = (R + rows - 1) / rows;
  const auto x_ = x.contiguous(), sum = at::empty({D}, number),
             partial = blocks > 1 ? at::empty({blocks, D}, number) : sum;
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::column_sums(pointer<T>(x_), R, D, rows, mutable_pointer<float>(partial), stream);
    if (blocks > 1)
      cuda::column_sums(pointer<float>(partial), blocks, D, blocks, mutable_pointer<float>(sum), stream);
  });
  return sum;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("column_sum", &sum_of_rows);
}

}  // namespace megalodon::ops
