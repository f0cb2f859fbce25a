#pragma once
#include <cuda_pipeline.h>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"

// Rows of a matrix that a kernel goes over more than once.
namespace megalodon::ops::cuda {

// Norms of rows: a block takes kTileRows rows at once, a thread the same columns of each, V where rows have
// at most kMostRowThreads packs. Of up to kFewRows rows, as in decoding, it takes one, and what else it reads
// is on its way before its row is.
inline constexpr int kTileRows = 4, kMostRowThreads = 768, kFewRows = 64;

// A thread's V columns of a block's rows. They come once, into shared memory [kRows, threads], where only the
// thread itself reads them: several tiles may be on their way. Where a thread has more columns (not kKept),
// they are read from the matrix each time. Rows that are not there are zeros.
template <class T, int V, bool kKept, int kRows = kTileRows>
struct RowTile {
  static constexpr int kPacks = kKept ? kRows : 0;  // of a thread

  const T* x;  // the first row
  std::int64_t pitch;
  int rows;
  Pack<T, V>* kept;

  // From `column` on. To be committed and waited for.
  __device__ void start(std::int64_t column) const {
#pragma unroll
    for (int r = 0; r < kPacks; ++r) {
      Pack<T, V>* const to = kept + r * blockDim.x + threadIdx.x;
      if (r >= rows) {
        *to = {};
      } else if constexpr (sizeof(*to) >= 4) {
        __pipeline_memcpy_async(to, x + r * pitch + column, sizeof(*to));
      } else {
        *to = load_pack<V>(x + r * pitch + column);
      }
    }
  }
  __device__ void read(int r, std::int64_t column, float (&to)[V]) const {
    if constexpr (kKept) {
      unpack(kept[r * blockDim.x + threadIdx.x], to);
    } else {
      unpack(r < rows ? load_pack<V>(x + r * pitch + column) : Pack<T, V>{}, to);
    }
  }
};

// f(i) for the first of each V columns i of the thread.
template <int V, bool kKept, class F>
__device__ void for_columns(std::int64_t D, F&& f) {
  std::int64_t i = std::int64_t{threadIdx.x} * V;
  if constexpr (kKept) {
    if (i < D) f(i);
  } else {
    for (; i < D; i += std::int64_t{blockDim.x} * V) f(i);
  }
}

template <int V, bool kKept>
__device__ void prefetch_columns(std::int64_t rows, std::int64_t D, const float* numbers) {
  if (numbers == nullptr || rows > kFewRows) return;
  for_columns<V, kKept>(D, [&](std::int64_t i) { prefetch(numbers + i); });
}

// A parameter's numbers for a thread's columns, zeros where there is none. Where a thread has one pack of
// them (kKept) they are on their way from here on.
template <int V, bool kKept>
class ColumnNumbers {
 public:
  __device__ ColumnNumbers(const float* numbers, std::int64_t D) : numbers_(numbers) {
    if constexpr (kKept) {
      for_columns<V, kKept>(D, [&](std::int64_t i) {
        if (numbers != nullptr) load(numbers + i, kept_);
      });
    }
  }
  __device__ void read(std::int64_t i, float (&to)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = kKept ? kept_[kKept ? j : 0] : 0;
    if (!kKept && numbers_ != nullptr) load(numbers_ + i, to);
  }

 private:
  const float* numbers_;
  float kept_[kKept ? V : 1] = {};
};

// The rows of x from `first` on. Tile `place` of those in the block's shared memory.
template <class T, int V, bool kKept, int kRows = kTileRows>
__device__ RowTile<T, V, kKept, kRows> row_tile(const T* x, std::int64_t rows, std::int64_t D,
                                                std::int64_t first, uint4* shared, int place) {
  auto* const kept = reinterpret_cast<Pack<T, V>*>(shared) + place * kRows * blockDim.x;
  return {x + first * D, D, static_cast<int>(min(rows - first, std::int64_t{kRows})), kept};
}
template <class T, int V, bool kKept, int kRows>
__device__ RowTile<T, V, kKept, kRows> read_rows(const T* x, std::int64_t rows, std::int64_t D,
                                                 std::int64_t first, uint4* shared) {
  const auto tile = row_tile<T, V, kKept, kRows>(x, rows, D, first, shared, 0);
  for_columns<V, kKept>(D, [&](std::int64_t i) { tile.start(i); });
  __pipeline_commit();
  __pipeline_wait_prior(0);
  return tile;
}

// f(first row, tile of x, tile of y) for all rows of two matrices, which the blocks of a row of the grid
// share. The next tiles come while f uses these.
template <class T, int V, bool kKept, class F>
__device__ void for_row_tiles(const T* x, const T* y, std::int64_t rows, std::int64_t D, uint4* shared,
                              F&& f) {
  const auto tile = [&](const T* from, std::int64_t first, int place) {
    return row_tile<T, V, kKept>(from, rows, D, first, shared, place);
  };
  const auto start = [&](std::int64_t first, int place) {
    if (first < rows) {
      for_columns<V, kKept>(D, [&](std::int64_t i) {
        tile(x, first, place).start(i);
        tile(y, first, place + 1).start(i);
      });
    }
    __pipeline_commit();
  };
  const std::int64_t step = std::int64_t{gridDim.x} * kTileRows;
  std::int64_t first = std::int64_t{blockIdx.x} * kTileRows;
  start(first, 0);
  for (int place = 0; first < rows; first += step, place ^= 2) {
    start(first + step, place ^ 2);
    __pipeline_wait_prior(1);
    f(first, tile(x, first, place), tile(y, first, place + 1));
  }
}

// K sums for each column of the thread: in registers, or in shared memory [K, D].
template <int K, int V, bool kKept>
class ColumnTotals {
 public:
  __device__ ColumnTotals(float* shared, std::int64_t D) : shared_(shared), D_(D) {
    if constexpr (!kKept) {
      for_columns<V, kKept>(D, [&](std::int64_t i) {
        for (int k = 0; k < K * V; ++k) shared[k / V * D + i + k % V] = 0;
      });
    }
  }
  __device__ void add(int k, std::int64_t i, int j, float value) {
    if constexpr (kKept) {
      kept_[k][j] += value;
    } else {
      shared_[k * D_ + i + j] += value;
    }
  }
  // As to[k * D + i].
  __device__ void store(float* to) const {
    for_columns<V, kKept>(D_, [&](std::int64_t i) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        float values[V];
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = kKept ? kept_[k][kKept ? j : 0] : shared_[k * D_ + i + j];
        cuda::store(values, to + k * D_ + i);
      }
    });
  }

 private:
  float* shared_;
  std::int64_t D_;
  float kept_[K][kKept ? V : 1] = {};
};

template <class F>
void with_rows_of_block(std::int64_t rows, F&& f) {
  if (rows <= kFewRows) {
    f(Width<1>{});
  } else {
    f(Width<kTileRows>{});
  }
}

// launch.operator()<V, kKept>(threads, bytes): threads of a block for rows of D elements of T at `pointers`,
// and bytes of `tiles` tiles, or without them of `totals` numbers a column.
template <class T, class F, class... P>
void with_row_layout(std::int64_t D, int tiles, int totals, F&& launch, const P*... pointers) {
  with_pack_width<T>(
      D,
      [&]<int V>(Width<V>) {
        const std::int64_t packs = ceil_div(D, V);
        const auto threads = static_cast<unsigned>(ceil_div(packs, 32) * 32);
        const std::size_t bytes = sizeof(Pack<T, V>) * kTileRows * tiles * threads;
        if (packs <= kMostRowThreads && bytes <= most_shared_memory()) {
          launch.template operator()<V, true>(threads, bytes);
        } else {
          launch.template operator()<V, false>(unsigned{kMostRowThreads},
                                               sizeof(float) * static_cast<std::size_t>(totals * D));
        }
      },
      pointers...);
}

}  // namespace megalodon::ops::cuda
