#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/parallel.h"

namespace megalodon::ops {

// Sums over many rows, for the gradients of parameters: float32 for some rows, then float64, so that the
// error does not grow with their number. Add each row to recent(), then count it; finish() completes `total`.
class ColumnSums {
 public:
  ColumnSums(std::int64_t columns, double* total)
      : recent_(static_cast<std::size_t>(columns)), total_(total) {
    std::fill_n(total_, columns, 0.0);
  }

  float* recent() { return recent_.data(); }
  void count_row() {
    if (++rows_ == kRows) finish();
  }
  void finish() {
    for (std::size_t i = 0; i < recent_.size(); ++i) {
      total_[i] += static_cast<double>(recent_[i]);
      recent_[i] = 0;
    }
    rows_ = 0;
  }

 private:
  static constexpr int kRows = 64;
  std::vector<float> recent_;
  double* total_;
  int rows_ = 0;
};

// Rows of D elements that are worth a thread.
inline std::int64_t grain_of_rows(std::int64_t D) {
  return std::max<std::int64_t>(1, (1 << 14) / D);
}

// The rows of a matrix in blocks that depend on their number alone, so that sums over them have the same bits
// whatever the number of threads.
inline std::int64_t row_block_size(std::int64_t rows) {
  return std::max<std::int64_t>(64, (rows + 63) / 64);
}
inline std::int64_t row_block_count(std::int64_t rows) {
  return (rows + row_block_size(rows) - 1) / row_block_size(rows);
}
// Calls f(block, begin, end) for each, on all threads.
template <class F>
void for_row_blocks(std::int64_t rows, F&& f) {
  const std::int64_t size = row_block_size(rows);
  parallel_for(row_block_count(rows), 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block)
      f(block, block * size, std::min(rows, (block + 1) * size));
  });
}

}  // namespace megalodon::ops
