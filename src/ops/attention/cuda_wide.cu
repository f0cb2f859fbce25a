#include "ops/attention/cuda.h"
#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_tensor_map.h"

// Attention of wide heads on Hopper's tensor cores. The weights of whole chunks are in memory, in bfloat16
// and on and below the diagonal alone; scores and their gradients stay in registers. Every kernel goes
// through tiles of 128 rows: a warpgroup copies, two multiply 64 rows each. A tile is taken by the block that
// asks first, and is computed in the same order whoever takes it.
namespace megalodon::ops::cuda {
namespace {

constexpr int kRows = 128, kDepth = 64, kColumns = 256, kKeyWidth = 256;
constexpr int kThreads = 384, kMultiplying = 256;
constexpr int kRowsBytes = kRows * kDepth * 2, kColumnsBytes = kColumns * kDepth * 2;
constexpr int kHalf = kRowsBytes / 2;  // of a tile's bytes: the second warpgroup's part
constexpr float kLog2e = 1.44269504f;

// Problems are heads of chunks, chunk by chunk.
struct Shape {
  int problems, length, blocks;  // blocks of 128 rows in a chunk
  int heads, first_head, H;
  int first, step;  // positions: the first chunk's, and from chunk to chunk
  int group;        // query heads that share a key head
  float scale;

  __device__ int position(int problem) const { return first + problem / heads * step; }
  __device__ int head(int problem) const { return first_head + problem % heads; }
};

// Numbers of the tiles that a block takes, from the thread that asks for them to those that multiply.
struct TileQueue {
  Barrier full[2], empty[2];
  int tile[2];

  __device__ void start() {
    for (int i = 0; i < 2; ++i) full[i].start(1), empty[i].start(kMultiplying / 32);
  }
  __device__ void give(int n, int number) {
    empty[n % 2].wait(n / 2 + 1);
    tile[n % 2] = number;
    full[n % 2].arrive();
  }
  // One lane of a warp waits, reads and arrives: tools that look for races follow each thread by itself.
  __device__ int take(int n) {
    int number = 0;
    if (threadIdx.x % 32 == 0) {
      full[n % 2].wait(n / 2);
      number = tile[n % 2];
      empty[n % 2].arrive();
    }
    return __shfl_sync(~0u, number, 0);
  }
};

// The ring of stages that are filled by the copying thread and read by the warpgroups that multiply.
template <int kStages>
struct Ring {
  Barrier full[kStages], empty[kStages];

  __device__ void start() {
    for (int i = 0; i < kStages; ++i) full[i].start(1), empty[i].start(kMultiplying / 32);
  }
};
// A thread's place in it.
template <int kStages>
struct Cursor {
  Ring<kStages>& ring;
  int stage = 0, phase = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, ++phase;
  }
  // copy(stage, barrier) orders copies of `bytes` bytes.
  template <class F>
  __device__ void fill(int bytes, F&& copy) {
    ring.empty[stage].wait(phase + 1);
    ring.full[stage].arrive_expecting(bytes);
    copy(stage, ring.full[stage]);
    advance();
  }
  // multiply(i, stage) for i from `from` to `to` of the stages of a product; it is done, and the stages free,
  // after finish().
  template <class F>
  __device__ void issue(int from, int to, F&& multiply) {
    for (int i = from; i < to; ++i) {
      ring.full[stage].wait(phase);
      products_begin();
      multiply(i, stage);
      products_commit();
      if (i > 0) {
        products_wait<1>();
        free_previous();
      }
      advance();
    }
  }
  __device__ void finish() {
    products_wait<0>();
    free_previous();
  }
  // Passes over a stage while nothing is ordered.
  __device__ void skip() {
    ring.full[stage].wait(phase);
    advance();
    free_previous();
  }
  __device__ void free_previous() {
    if (threadIdx.x % 32 == 0) ring.empty[stage == 0 ? kStages - 1 : stage - 1].arrive();
  }
};

// Asks for tiles and calls fill(tile) for each: the part of the copying thread.
template <class F>
__device__ void for_tiles_taken(int* next, int tiles, TileQueue& queue, F&& fill) {
  int tile = atomicAdd(next, 1);
  for (int n = 0;; ++n) {
    queue.give(n, tile);
    if (tile >= tiles) return;
    const int after = atomicAdd(next, 1);
    fill(tile);
    tile = after;
  }
}

// A multiplying thread's place: its warpgroup and the numbers of a tile that it holds. Number 4 j + 2 half +
// e is that of row + 8 half and column 8 j + column + e.
struct Place {
  int warpgroup = threadIdx.x / 128 - 1;
  int row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  int column = threadIdx.x % 4 * 2;

  // Puts value(half) where the key, `first_key` + column, is behind the query.
  template <int N, class F>
  __device__ void hide(int first_key, float (&d)[N], F&& value) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first_key + i / 4 * 8 + column + i % 2 > row + i % 4 / 2 * 8) d[i] = value(i % 4 / 2);
  }
};

__device__ std::uint32_t packed(float low, float high) {
  const auto pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

// The warpgroups take turns to begin a product, so that what one does between products falls into the
// other's.
struct Turns {
  int warpgroup;

  __device__ explicit Turns(int warpgroup) : warpgroup(warpgroup) {
    if (warpgroup == 1) pass();
  }
  __device__ void wait() const { named_wait(1 + warpgroup, kMultiplying); }
  __device__ void pass() const { named_arrive(2 - warpgroup, kMultiplying); }
};

// Stores N numbers of a row; word(j) is the thread's pair of columns 8 j + column. The four threads of a row
// exchange pairs, so that each stores 16 bytes.
template <int N, class F>
__device__ void store_row(Bfloat16* row, F&& word) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < N / 8; j += 4) {
    const std::uint32_t x[4] = {word(j), word(j + 1), word(j + 2), word(j + 3)};
    const auto low = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
    const auto high = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
    const std::uint32_t y[4] = {odd ? low : x[0], odd ? x[1] : low, odd ? high : x[2], odd ? x[3] : high};
    const auto first = __shfl_xor_sync(~0u, upper ? y[0] : y[2], 2);
    const auto second = __shfl_xor_sync(~0u, upper ? y[1] : y[3], 2);
    *reinterpret_cast<uint4*>(row + 8 * (j + threadIdx.x % 4)) =
        upper ? uint4{first, second, y[2], y[3]} : uint4{y[0], y[1], first, second};
  }
}

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

extern __shared__ char shared_bytes[];
__device__ char* shared_tiles() {
  return shared_bytes + (-shared_address(shared_bytes) & 1023);
}

// Forward weights, relative to a score of the row: 2^(scores scale log2(e) - origin); their sums, and the
// logarithms of the softmax's denominators. A tile is a block of 128 queries, whose keys are gone through
// from the diagonal on. The origin is the largest score of the first 128 keys; where a later one is larger by
// more than kMostAbove, so that sums come near float's end, all keys are gone through again, from the
// largest.
constexpr int kWeightStages = 10;
constexpr float kMostAbove = 64;

struct WeightsWork {
  CUtensorMap q, k;
  Shape shape;
  Bfloat16* weights;  // [problems, length, length]
  float* sums;        // [problems, length]
  float* lse;         // [B L, H]
  int* next;
};

struct WeightsShared {
  Ring<kWeightStages> ring;
  TileQueue queue;
  Barrier queries, pass_over;
  bool again;
};

__device__ void copy_for_weights(const WeightsWork& work, char* queries, char* stages,
                                 WeightsShared& shared) {
  const Shape& s = work.shape;
  Cursor<kWeightStages> cursor{shared.ring};
  int pass = 0;
  for_tiles_taken(work.next, s.problems * s.blocks, shared.queue, [&](int tile) {
    const int block = s.blocks - 1 - tile / s.problems, problem = tile % s.problems;
    const int position = s.position(problem), head = s.head(problem);
    const int key_block = head / s.group * (kKeyWidth / kDepth);
    shared.queries.arrive_expecting(kRows * kKeyWidth * 2);
    copy_tile(queries, work.q, position + block * kRows, head * (kKeyWidth / kDepth), shared.queries);
    do {
      for (int key = block; key >= 0; --key) {
        for (int i = 0; i < kKeyWidth / kDepth; ++i) {
          cursor.fill(kRowsBytes, [&](int stage, Barrier& full) {
            copy_tile(stages + stage * kRowsBytes, work.k, position + key * kRows, key_block + i, full);
          });
        }
      }
      shared.pass_over.wait(pass++);
    } while (shared.again);
  });
}

__device__ void multiply_for_weights(const WeightsWork& work, const char* queries, const char* stages,
                                     WeightsShared& shared) {
  const Shape& s = work.shape;
  const Place place;
  const Turns turns(place.warpgroup);
  const float factor = s.scale * kLog2e;
  Cursor<kWeightStages> cursor{shared.ring};
  for (int n = 0;; ++n) {
    const int tile = shared.queue.take(n);
    if (tile >= s.problems * s.blocks) return;
    const int block = s.blocks - 1 - tile / s.problems, problem = tile % s.problems;
    const std::int64_t row = std::int64_t{problem} * s.length + block * kRows + place.row;
    float largest[2] = {-INFINITY, -INFINITY}, origin[2], sums[2];
    shared.queries.wait(n);
    bool again = false;
    do {
      sums[0] = sums[1] = 0;
      for (int key = block; key >= 0; --key) {
        float scores[kRows / 2];
        turns.wait();
        cursor.issue(0, kKeyWidth / kDepth, [&](int i, int stage) {
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            multiply<false, false>(scores,
                                   operand<false>(queries + i * kRowsBytes + place.warpgroup * kHalf, step),
                                   operand<false>(stages + stage * kRowsBytes, step), i + step > 0);
          }
        });
        turns.pass();
        cursor.finish();
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) scores[i] *= factor;
        if (key == block) place.hide(0, scores, [](int) { return -INFINITY; });
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], scores[i]);
        if (key == block) origin[0] = quad_max(largest[0]), origin[1] = quad_max(largest[1]);
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
          scores[i] = exp2_fast(scores[i] - origin[i % 4 / 2]);
          sums[i % 4 / 2] += scores[i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store_row<kRows>(work.weights + (row + 8 * half) * s.length + key * kRows, [&](int j) {
            return packed(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]);
          });
        }
      }
      again = named_any(3, kMultiplying, fmaxf(largest[0] - origin[0], largest[1] - origin[1]) > kMostAbove);
      if (threadIdx.x == kThreads - kMultiplying) shared.again = again;
      if (threadIdx.x % 32 == 0) shared.pass_over.arrive();
    } while (again);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums[half]);
      if (place.column != 0) continue;
      const std::int64_t position = s.position(problem) + block * kRows + place.row + 8 * half;
      work.sums[row + 8 * half] = sum;
      work.lse[position * s.H + s.head(problem)] = (origin[half] + log2f(sum)) / kLog2e;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) causal_weights(const __grid_constant__ WeightsWork work) {
  if constexpr (kForHopper) {
    char* const queries = shared_tiles();
    char* const stages = queries + kRows * kKeyWidth * 2;
    auto& shared = *reinterpret_cast<WeightsShared*>(stages + kWeightStages * kRowsBytes);
    if (threadIdx.x == 0) {
      shared.ring.start();
      shared.queue.start();
      shared.queries.start(1);
      shared.pass_over.start(kMultiplying / 32);
      barriers_are_started();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
      multiply_for_weights(work, queries, stages, shared);
    } else if (threadIdx.x == 0) {
      copy_for_weights(work, queries, stages, shared);
    }
  }
}

// What the kernels of 128 x 256 tiles have in common.
constexpr int kStages = 4, kStageBytes = kRowsBytes + kColumnsBytes;

struct TilesShared {
  Ring<kStages> ring;
  TileQueue queue;
};

template <class Copy, class Multiply>
__device__ void copy_and_multiply(Copy&& copy, Multiply&& multiply) {
  char* const stages = shared_tiles();
  auto& shared = *reinterpret_cast<TilesShared*>(stages + kStages * kStageBytes);
  if (threadIdx.x == 0) {
    shared.ring.start();
    shared.queue.start();
    barriers_are_started();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    take_registers<232>();
    multiply(stages, shared);
  } else {
    give_registers<40>();
    if (threadIdx.x == 0) copy(stages, shared);
  }
}

// The first N columns of d [64 of a tile's rows, 256] = a b over `blocks` stages, of which the first `turn`
// are begun in turns.
template <int N, bool kTransposeA, bool kTransposeB>
__device__ void multiply_stages(Cursor<kStages>& cursor, const Turns& turns, int turn, int blocks,
                                const char* stages, float (&d)[kColumns / 2]) {
  const auto multiply_stage = [&](int i, int stage) {
    const char* const a = stages + stage * kStageBytes;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      multiply<kTransposeA, kTransposeB>(reinterpret_cast<float (&)[N / 2]>(d),
                                         operand<kTransposeA>(a + turns.warpgroup * kHalf, step),
                                         operand<kTransposeB>(a + kRowsBytes, step), i + step > 0);
    }
  };
  turns.wait();
  cursor.issue(0, turn, multiply_stage);
  turns.pass();
  cursor.issue(turn, blocks, multiply_stage);
  cursor.finish();
}

// Products of a triangle of weights or of their gradients, a [problems, length, length], with rows of the
// chunk, b [B L, heads, width]: out [B L, H, width], rows divided by `sums` where given. Of a or, transposed,
// of a^T.
struct Product {
  CUtensorMap a, b;
  Bfloat16* out;
  const float* sums;  // [problems, length]
  int columns;        // blocks of 256 in a head's width
  int group;          // heads of out that share one of b
  bool transposed;
};
constexpr int kMostProducts = 3;

struct ProductsWork {
  Product products[kMostProducts];
  Shape shape;
  int columns;  // of all products
  int* next;
};

// A block of 128 rows and 256 columns; the longest of a problem come first.
struct ProductTile {
  int problem, longest_first, product = 0, column;

  __device__ ProductTile(const ProductsWork& work, int tile)
      : problem(tile / (work.columns * work.shape.blocks)),
        longest_first(tile / work.columns % work.shape.blocks),
        column(tile % work.columns) {
    while (column >= work.products[product].columns) column -= work.products[product++].columns;
  }
  __device__ int block(const ProductsWork& work) const {
    return work.products[product].transposed ? longest_first : work.shape.blocks - 1 - longest_first;
  }
  __device__ int stages(const ProductsWork& work) const {
    return (work.shape.blocks - longest_first) * (kRows / kDepth);
  }
};

__device__ void copy_for_products(const ProductsWork& work, char* stages, TilesShared& shared) {
  const Shape& s = work.shape;
  Cursor<kStages> cursor{shared.ring};
  for_tiles_taken(work.next, s.problems * s.blocks * work.columns, shared.queue, [&](int number) {
    const ProductTile tile(work, number);
    const Product& product = work.products[tile.product];
    const int block = tile.block(work), first = product.transposed ? block * kRows : 0;
    const int rows = tile.problem * s.length, position = s.position(tile.problem) + first;
    const int b_block =
        (s.head(tile.problem) / product.group * product.columns + tile.column) * (kColumns / kDepth);
    for (int i = 0; i < tile.stages(work); ++i) {
      cursor.fill(kStageBytes, [&](int stage, Barrier& full) {
        char* const a = stages + stage * kStageBytes;
        if (product.transposed) {
          copy_tile(a, product.a, rows + first + i * kDepth, block * (kRows / kDepth), full);
        } else {
          copy_tile(a, product.a, rows + block * kRows, i, full);
        }
        copy_tile(a + kRowsBytes, product.b, position + i * kDepth, b_block, full);
      });
    }
  });
}

__device__ void multiply_for_products(const ProductsWork& work, const char* stages, TilesShared& shared) {
  const Shape& s = work.shape;
  const Place place;
  const Turns turns(place.warpgroup);
  Cursor<kStages> cursor{shared.ring};
  for (int n = 0;; ++n) {
    const int number = shared.queue.take(n);
    if (number >= s.problems * s.blocks * work.columns) return;
    const ProductTile tile(work, number);
    const Product& product = work.products[tile.product];
    const int row = tile.block(work) * kRows + place.row, width = product.columns * kColumns;
    float factors[2] = {1, 1}, d[kColumns / 2];
    if (product.sums != nullptr) {
      const float* const sums = product.sums + std::int64_t{tile.problem} * s.length + row;
      factors[0] = 1 / sums[0], factors[1] = 1 / sums[8];
    }
    // Of the triangle's block on the diagonal each warpgroup has a part that is all zero.
    const bool skips = product.transposed == (place.warpgroup == 1);
    const int count = tile.stages(work) - skips, turn = min(2, count);
    if (product.transposed) {
      if (skips) cursor.skip();
      multiply_stages<kColumns, true, true>(cursor, turns, turn, count, stages, d);
    } else {
      multiply_stages<kColumns, false, true>(cursor, turns, turn, count, stages, d);
      if (skips) cursor.skip();
    }
    Bfloat16* const out = product.out + s.head(tile.problem) * width + tile.column * kColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t position = s.position(tile.problem) + row + 8 * half;
      store_row<kColumns>(out + position * s.H * width, [&](int j) {
        return packed(d[4 * j + 2 * half] * factors[half], d[4 * j + 2 * half + 1] * factors[half]);
      });
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    triangular_products(const __grid_constant__ ProductsWork work) {
  if constexpr (kForHopper) {
    copy_and_multiply(
        [&](char* stages, TilesShared& shared) { copy_for_products(work, stages, shared); },
        [&](char* stages, TilesShared& shared) { multiply_for_products(work, stages, shared); });
  }
}

// Backward weights, e^(scores scale - lse), and the gradients of the scores: tiles of 128 queries and 256
// keys. First the scores, whose weights stay in registers, then the gradients of the weights.
struct GradientsWork {
  CUtensorMap q, k, d_o, v;
  Shape shape;
  int width;                     // of a value
  Bfloat16 *weights, *d_scores;  // [problems, length, length]
  const float *lse, *delta;      // [B L, H]
  int* next;

  __device__ int pairs() const { return shape.blocks / 2; }  // of blocks of queries: m + 1 tiles each
  __device__ int tiles_of_problem() const { return pairs() * (pairs() + 1); }
};

struct GradientsTile {
  int problem, block, key;  // blocks of 128 queries and of 256 keys

  __device__ GradientsTile(const GradientsWork& work, int tile) : problem(tile / work.tiles_of_problem()) {
    int rest = tile % work.tiles_of_problem(), pair = 0;
    while (rest >= 2 * (pair + 1)) rest -= 2 * ++pair;
    block = 2 * pair + rest / (pair + 1);
    key = rest % (pair + 1);
  }
};

__device__ void copy_for_gradients(const GradientsWork& work, char* stages, TilesShared& shared) {
  const Shape& s = work.shape;
  Cursor<kStages> cursor{shared.ring};
  for_tiles_taken(work.next, s.problems * work.tiles_of_problem(), shared.queue, [&](int number) {
    const GradientsTile tile(work, number);
    const int query = s.position(tile.problem) + tile.block * kRows;
    const int key = s.position(tile.problem) + tile.key * kColumns, head = s.head(tile.problem);
    const auto copy = [&](const CUtensorMap& rows, const CUtensorMap& columns, int depth) {
      for (int i = 0; i < depth / kDepth; ++i) {
        cursor.fill(kStageBytes, [&](int stage, Barrier& full) {
          char* const a = stages + stage * kStageBytes;
          copy_tile(a, rows, query, head * (depth / kDepth) + i, full);
          copy_tile(a + kRowsBytes, columns, key, head / s.group * (depth / kDepth) + i, full);
        });
      }
    };
    copy(work.q, work.k, kKeyWidth);
    copy(work.d_o, work.v, work.width);
  });
}

__device__ void multiply_for_gradients(const GradientsWork& work, const char* stages, TilesShared& shared) {
  const Shape& s = work.shape;
  const Place place;
  const Turns turns(place.warpgroup);
  Cursor<kStages> cursor{shared.ring};
  for (int n = 0;; ++n) {
    const int number = shared.queue.take(n);
    if (number >= s.problems * work.tiles_of_problem()) return;
    const GradientsTile tile(work, number);
    const int row = tile.block * kRows + place.row;
    const int first_key = tile.key * kColumns - tile.block * kRows;
    const bool diagonal = first_key + kColumns > 0;
    float log_sums[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t position = s.position(tile.problem) + row + 8 * half;
      log_sums[half] = work.lse[position * s.H + s.head(tile.problem)] * kLog2e;
      delta[half] = work.delta[position * s.H + s.head(tile.problem)];
    }
    const std::int64_t to = (std::int64_t{tile.problem} * s.length + row) * s.length + tile.key * kColumns;
    float d[kColumns / 2];
    const auto multiply_tile = [&](int turn, int depth) {
      if (first_key == 0) {  // no query of the tile sees its second 128 keys
        multiply_stages<kRows, false, false>(cursor, turns, turn, depth, stages, d);
      } else {
        multiply_stages<kColumns, false, false>(cursor, turns, turn, depth, stages, d);
      }
    };
    std::uint32_t weights[2][kColumns / 8];
    multiply_tile(kKeyWidth / kDepth, kKeyWidth / kDepth);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) d[i] = exp2_fast(d[i] * (s.scale * kLog2e) - log_sums[i % 4 / 2]);
    if (diagonal) place.hide(first_key, d, [](int) { return 0; });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
        weights[half][j] = packed(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
      store_row<kColumns>(work.weights + to + 8 * half * s.length, [&](int j) { return weights[half][j]; });
    }
    multiply_tile(2, work.width / kDepth);
    if (diagonal) place.hide(first_key, d, [&](int half) { return delta[half]; });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto gradient = [&](int i, std::uint32_t weight) {
        return __uint_as_float(weight) * (d[i] - delta[half]) * s.scale;
      };
      store_row<kColumns>(work.d_scores + to + 8 * half * s.length, [&](int j) {
        return packed(gradient(4 * j + 2 * half, weights[half][j] << 16),
                      gradient(4 * j + 2 * half + 1, weights[half][j] & 0xffff0000));
      });
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) score_gradients(const __grid_constant__ GradientsWork work) {
  if constexpr (kForHopper) {
    copy_and_multiply(
        [&](char* stages, TilesShared& shared) { copy_for_gradients(work, stages, shared); },
        [&](char* stages, TilesShared& shared) { multiply_for_gradients(work, stages, shared); });
  }
}

// A matrix [rows, columns] for copies of boxes of `box_rows` rows and 64 `box_blocks` columns.
CUtensorMap matrix_map(const Bfloat16* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                       int box_blocks) {
  return cuda::matrix_map("attention", matrix, rows, columns, columns, box_rows, box_blocks);
}

template <class Work>
void launch_tiles(void (*kernel)(Work), const Work& work, std::int64_t tiles, std::size_t bytes,
                  cudaStream_t stream) {
  allow_shared_memory(kernel, bytes);
  kernel<<<grid_size(tiles, multiprocessors()), kThreads, bytes, stream>>>(work);
}

constexpr std::size_t kAlignment = 1024;
constexpr std::size_t kTilesBytes = kAlignment + kStages * kStageBytes + sizeof(TilesShared);

Shape shape_of(const WideSizes& s) {
  const auto narrow = [](std::int64_t x) { return static_cast<int>(x); };
  return {.problems = narrow(s.count * s.heads),
          .length = narrow(s.length),
          .blocks = narrow(s.length / kRows),
          .heads = narrow(s.heads),
          .first_head = narrow(s.first_head),
          .H = narrow(s.H),
          .first = narrow(s.first),
          .step = narrow(s.step),
          .group = narrow(s.H / s.Hkv),
          .scale = s.scale};
}

// Of weights, or of their gradients.
CUtensorMap triangle_map(const WideSizes& s, const Bfloat16* triangles, bool transposed) {
  return matrix_map(triangles, s.count * s.heads * s.length, s.length, transposed ? kDepth : kRows,
                    transposed ? kRows / kDepth : 1);
}

Product product_of(const WideSizes& s, const Bfloat16* triangles, bool transposed, const Bfloat16* b,
                   std::int64_t b_heads, std::int64_t width, const float* sums, Bfloat16* out) {
  return {.a = triangle_map(s, triangles, transposed),
          .b = matrix_map(b, s.positions, b_heads * width, kDepth, kColumns / kDepth),
          .out = out,
          .sums = sums,
          .columns = static_cast<int>(width / kColumns),
          .group = static_cast<int>(s.H / b_heads),
          .transposed = transposed};
}

void launch_products(const WideSizes& s, ProductsWork work, cudaStream_t stream) {
  for (const auto& product : work.products) work.columns += product.columns;
  launch_tiles(triangular_products, work, s.count * s.heads * work.shape.blocks * work.columns, kTilesBytes,
               stream);
}

}  // namespace

bool has_wide_kernels(std::int64_t key_width, std::int64_t value_width, std::int64_t length) {
  return key_width == kKeyWidth && value_width % kColumns == 0 && length % kColumns == 0 && has_hopper_code();
}

void wide_forward(const WideSizes& s, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
                  const WideScratch& scratch, Bfloat16* o, float* lse, cudaStream_t stream) {
  cudaMemsetAsync(scratch.next, 0, 2 * sizeof(int), stream);
  const WeightsWork weights{.q = matrix_map(q, s.positions, s.H * kKeyWidth, kRows, kKeyWidth / kDepth),
                            .k = matrix_map(k, s.positions, s.Hkv * kKeyWidth, kRows, 1),
                            .shape = shape_of(s),
                            .weights = scratch.weights,
                            .sums = scratch.sums,
                            .lse = lse,
                            .next = scratch.next};
  constexpr std::size_t kBytes =
      kAlignment + kRows * kKeyWidth * 2 + kWeightStages * kRowsBytes + sizeof(WeightsShared);
  launch_tiles(causal_weights, weights, s.count * s.heads * weights.shape.blocks, kBytes, stream);
  launch_products(s,
                  {.products = {product_of(s, scratch.weights, false, v, s.Hkv, s.dv, scratch.sums, o)},
                   .shape = shape_of(s),
                   .columns = 0,
                   .next = scratch.next + 1},
                  stream);
}

void wide_backward(const WideSizes& s, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
                   const float* lse, const float* delta, const Bfloat16* d_o, const WideScratch& scratch,
                   Bfloat16* dq, Bfloat16* dk, Bfloat16* dv, cudaStream_t stream) {
  cudaMemsetAsync(scratch.next, 0, 2 * sizeof(int), stream);
  const GradientsWork gradients{.q = matrix_map(q, s.positions, s.H * kKeyWidth, kRows, 1),
                                .k = matrix_map(k, s.positions, s.Hkv * kKeyWidth, kColumns, 1),
                                .d_o = matrix_map(d_o, s.positions, s.H * s.dv, kRows, 1),
                                .v = matrix_map(v, s.positions, s.Hkv * s.dv, kColumns, 1),
                                .shape = shape_of(s),
                                .width = static_cast<int>(s.dv),
                                .weights = scratch.weights,
                                .d_scores = scratch.d_scores,
                                .lse = lse,
                                .delta = delta,
                                .next = scratch.next};
  const std::int64_t pairs = s.length / kColumns;
  launch_tiles(score_gradients, gradients, s.count * s.heads * pairs * (pairs + 1), kTilesBytes, stream);
  launch_products(s,
                  {.products = {product_of(s, scratch.weights, true, d_o, s.H, s.dv, nullptr, dv),
                                product_of(s, scratch.d_scores, true, q, s.H, kKeyWidth, nullptr, dk),
                                product_of(s, scratch.d_scores, false, k, s.Hkv, kKeyWidth, nullptr, dq)},
                   .shape = shape_of(s),
                   .columns = 0,
                   .next = scratch.next + 1},
                  stream);
}

}  // namespace megalodon::ops::cuda
