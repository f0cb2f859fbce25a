#include "ops/embedding/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

at::Tensor chosen_rows(const at::Tensor& table, const at::Tensor& tokens) {
  const int64_t bytes = table.size(1) * table.element_size();
  if (bytes % 16 != 0) return at::embedding(table, tokens);
  const auto table_ = aligned(table, 16 / table.element_size()), tokens_ = tokens.contiguous();
  auto shape = tokens.sizes().vec();
  shape.push_back(table.size(1));
  const auto y = at::empty(shape, table.options());
  launch(table, [&](cudaStream_t stream) {
    cuda::chosen_rows(table_.const_data_ptr(), tokens_.const_data_ptr<int64_t>(), tokens.numel(),
                      table.size(0), bytes, y.mutable_data_ptr(), stream);
  });
  return y;
}

at::Tensor backward(const at::Tensor& dy, const at::Tensor& tokens, int64_t V) {
  const int64_t N = dy.size(0), D = dy.size(1);
  if (dy.numel() == 0) return at::zeros({V, D}, dy.options());
  const auto dy_ = dy.contiguous(), tokens_ = tokens.contiguous();
  // Blocks of 64 columns, as many as run side by side on 132 multiprocessors with 227 KB for their sums.
  const int64_t across = (D + 63) / 64, beside = 132 * ((227 << 10) / (V * 256 + 1024)),
                blocks = std::clamp<int64_t>(beside / across, 1, 192);
  const int64_t rows = std::max<int64_t>(64, (N + blocks - 1) / blocks);
  const auto partial = at::empty({(N + rows - 1) / rows, V, D}, dy.options());
  launch(dy, [&](cudaStream_t stream) {
    cuda::sums_by_token(pointer<float>(dy_), tokens_.const_data_ptr<int64_t>(), N, D, V, rows,
                        mutable_pointer<float>(partial), stream);
  });
  return sum_of_blocks(partial);
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("chosen_rows", &chosen_rows);
  m.impl("embedding_backward", &backward);
}

}  // namespace megalodon::ops
