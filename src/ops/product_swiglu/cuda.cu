#include "ops/product_swiglu/cuda.h"

#include <algorithm>

#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_mma.h"
#include "ops/cuda_tensor_map.h"
#include "ops/swiglu/cuda_sigmoid.h"

// A block goes through tiles of the product: a warpgroup copies, two multiply a tile each in turn, so that
// what one does with its sums falls into the other's products. Up to a depth of kMostResident the weight of
// the block's columns stays in shared memory and its tiles are below each other; a ring carries the rest.
namespace megalodon::ops::cuda {
namespace {

constexpr int kDepth = 64, kMostResident = 384;  // of a stage; of a weight that stays
[[maybe_unused]] constexpr int kThreads = 384, kMultiplying = 256;
[[maybe_unused]] constexpr int kBoxBytes = 64 * 128;  // 64 rows of 64 numbers
constexpr int kWarpBoxBytes = 16 * 128;               // a warp's rows of them
constexpr int kSetBytes = 2 * kWarpBoxBytes;
constexpr int kAcross = 2;  // backward: boxes in a tile's columns

template <bool kForward_, bool kHasB_, bool kResident_>
struct Config {
  static constexpr bool kForward = kForward_, kHasB = kHasB_, kResident = kResident_;
  static_assert(kHasB || !kForward);
  static constexpr int kHalves = kResident ? 1 : 2, kRows = 64 * kHalves;  // of a tile
  static constexpr int kColumns = kForward && kResident ? 192 : 128;       // of the product in a tile
  static constexpr int kFeatures = kForward ? kColumns / 2 : kColumns;     // forward: a's, and as many of b
  static constexpr int kStages = !kResident ? (kForward ? 6 : 5) : kForward ? 6 : 8;
  static constexpr int kRowsBytes = kRows * 128, kWeightBytes = kColumns * 128;
  static constexpr int kStageBytes = kRowsBytes + (kResident ? 0 : kWeightBytes);
  static constexpr int kResidentBytes = kResident ? kWeightBytes * (kMostResident / kDepth) : 0;
  static constexpr int kPitch = kFeatures * 2 + 16;  // forward: of 16 rows on their way to memory
  static constexpr int kWarpBytes = kForward ? 16 * kPitch : 2 * kSetBytes;
  static constexpr int kBytes = 1024 + kResidentBytes + kStages * kStageBytes + 8 * kWarpBytes + 512;
  static_assert(kBytes <= 227 * 1024);
};

struct Work {
  CUtensorMap x, weight;
  CUtensorMap a{}, b{}, da{}, db{}, to_y{};  // backward: boxes of a warp
  Bfloat16 *both = nullptr, *y = nullptr;    // [M, 2 F], forward; [M, F]; null where they are not wanted
  float* sums = nullptr;                     // backward: of a warp's rows of da, or null
  int M = 0, F = 0, depth = 0;               // depth: stages
  int rows = 0, columns = 0, group = 0;      // tiles; rows of tiles in a group
};

template <int kStages>
struct Shared {
  Barrier full[kStages], empty[kStages], resident, chunks[8][2];
};

// A block's i-th tile. Neighbouring blocks have tiles of a group of rows, so that these come from the second
// cache.
template <class C>
struct Tile {
  const Work& work;
  int row = 0, column = 0;

  // False behind the last.
  __device__ bool find(int i) {
    if constexpr (C::kResident) {
      row = blockIdx.x / work.columns + i * (gridDim.x / work.columns);
      column = blockIdx.x % work.columns;
      return row < work.rows;
    } else {
      const int number = blockIdx.x + i * gridDim.x, of_group = work.group * work.columns;
      const int group = number / of_group, rest = number % of_group;
      const int rows = min(work.group, work.rows - group * work.group);
      if (rows <= 0) return false;
      row = group * work.group + rest % rows;
      column = rest / rows;
      return column < work.columns;
    }
  }
};

// The weight's columns of a tile, 64 in depth from 64 k on.
template <class C>
__device__ void copy_weight(const Work& work, char* to, int column, int k, Barrier& full) {
  if constexpr (C::kForward) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy_tile(to + half * C::kFeatures * 128, work.weight, half * work.F + column * C::kFeatures, k, full);
    }
  } else {
    copy_tile(to, work.weight, k * kDepth, column * kAcross, full);
  }
}

// The part of the copying thread.
template <class C>
__device__ void copy_for_products(const Work& work, char* resident, char* stages,
                                  Shared<C::kStages>& shared) {
  Tile<C> tile{work};
  if (C::kResident && tile.find(0)) {
    shared.resident.arrive_expecting(work.depth * C::kWeightBytes);
#pragma unroll 1
    for (int k = 0; k < work.depth; ++k)
      copy_weight<C>(work, resident + k * C::kWeightBytes, tile.column, k, shared.resident);
  }
  RingPlace<C::kStages> place(0);
  for (int i = 0; tile.find(i); ++i) {
#pragma unroll 1
    for (int k = 0; k < work.depth; ++k) {
      Barrier& full = shared.full[place.stage];
      shared.empty[place.stage].wait(place.phase + 1);
      full.arrive_expecting(C::kStageBytes);
      char* const to = stages + place.stage * C::kStageBytes;
      copy_tile(to, work.x, tile.row * C::kRows, k, full);
      if constexpr (!C::kResident) copy_weight<C>(work, to + C::kRowsBytes, tile.column, k, full);
      place.advance();
    }
  }
}

__device__ float low(std::uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ float high(std::uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000);
}

// x, of which the compiler knows nothing: what follows from it does not take registers during products.
[[maybe_unused]] __device__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 rows of a warp to memory by way of `stage`; word(j, half) is the thread's pair of columns 8 j + ... of
// row + 8 half.
template <int kFeatures, int kPitch, class F>
__device__ void store_rows(char* stage, F&& word, Bfloat16* out, int pitch, int rows, int columns) {
  const int lane = opaque(threadIdx.x % 32);
  const std::uint32_t at = shared_address(stage) + (lane & 15) * kPitch + (lane >> 4) * 16;
#pragma unroll
  for (int j = 0; j < kFeatures / 8; j += 2) {
    const std::uint32_t words[4] = {word(j, 0), word(j, 1), word(j + 1, 0), word(j + 1, 1)};
    store_matrices<false>(words, at + j * 16);
  }
  __syncwarp();
  // A warp's units of 16 bytes are whole rows once in kPeriod times.
  constexpr int kUnits = kFeatures / 8, kPeriod = kUnits % 3 == 0 ? 3 : 1, kStep = 32 * kPeriod / kUnits;
  static_assert(32 * kPeriod % kUnits == 0 && 16 % kStep == 0);
#pragma unroll
  for (int p = 0; p < kPeriod; ++p) {
    const int unit = lane + 32 * p, first = unit / kUnits, column = unit % kUnits * 8;
    const char* const from = stage + first * kPitch + column * 2;
    Bfloat16* const to = out + static_cast<unsigned>(first * pitch + column);
#pragma unroll
    for (int row = 0; row < 16; row += kStep) {
      const uint4 value = *reinterpret_cast<const uint4*>(from + row * kPitch);
      if (column < columns && first + row < rows)
        *reinterpret_cast<uint4*>(to + static_cast<unsigned>(row * pitch)) = value;
    }
  }
  __syncwarp();
}

// a, b and y of a warpgroup's 64 rows from `row` on.
template <class C>
__device__ void finish_forward(const Work& work, char* stage, const float (&d)[C::kColumns / 2], int row,
                               int column) {
  const int first = opaque(row + threadIdx.x % 128 / 32 * 16), F = opaque(work.F);
  const int from = column * C::kFeatures, rows = work.M - first, columns = F - from;
  constexpr int kWords = C::kFeatures / 8;
  std::uint32_t as[kWords][2], bs[kWords][2];  // rounded first, so that the registers of d are free
#pragma unroll
  for (int i = 0; i < 2 * kWords; ++i) {
    const int j = i / 2, half = i % 2, n = 4 * j + 2 * half;
    as[j][half] = pack(d[n], d[n + 1]);
    bs[j][half] = pack(d[4 * kWords + n], d[4 * kWords + n + 1]);
    asm volatile("" : "+r"(as[j][half]), "+r"(bs[j][half]));
  }
  const auto store = [&](Bfloat16* out, int pitch, auto&& word) {
    store_rows<C::kFeatures, C::kPitch>(stage, word, out, pitch, rows, columns);
  };
  if (work.both != nullptr) {
    Bfloat16* const both = work.both + std::int64_t{first} * 2 * F + from;
    store(both, 2 * F, [&](int j, int half) { return as[j][half]; });
    store(both + F, 2 * F, [&](int j, int half) { return bs[j][half]; });
  }
  store(work.y + std::int64_t{first} * F + from, F, [&](int j, int half) {
    const std::uint32_t a = as[j][half], b = bs[j][half];
    return pack(low(a) * sigmoid(low(a)) * low(b), high(a) * sigmoid(high(a)) * high(b));
  });
}

// A warp's boxes of a and b, 16 rows of 64 columns: chunk n, of all its tiles' in order, goes to set n % 2.
template <class C>
struct Chunks {
  const Work& work;
  char* sets;
  Barrier* full;
  int warpgroup, warp;

  // By one lane.
  __device__ void order(int n) {
    constexpr int kChunks = kAcross * C::kHalves;
    Tile<C> tile{work};
    if (!tile.find(warpgroup + 2 * (n / kChunks))) return;
    const int chunk = n % kChunks;
    const int row = tile.row * C::kRows + chunk / kAcross * 64 + warp * 16;
    const int block = tile.column * kAcross + chunk % kAcross;
    char* const to = sets + n % 2 * kSetBytes;
    full[n % 2].arrive_expecting(C::kHasB ? kSetBytes : kWarpBoxBytes);
    copy_tile(to, work.a, row, block, full[n % 2]);
    if constexpr (C::kHasB) copy_tile(to + kWarpBoxBytes, work.b, row, block, full[n % 2]);
    if (chunk + 2 < kChunks) {  // the next of this set
      prefetch_tile(work.a, row + 64, block);
      if constexpr (C::kHasB) prefetch_tile(work.b, row + 64, block);
    }
  }
};

// Stores 64 numbers of a row; word(j) is the thread's pair of columns 8 j + ... The four threads of a row
// exchange pairs, so that each stores 16 bytes.
template <class F>
__device__ void store_row(Bfloat16* row, bool inside, F&& word) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const std::uint32_t x[4] = {word(j), word(j + 1), word(j + 2), word(j + 3)};
    const auto even = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
    const auto other = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
    const std::uint32_t y[4] = {odd ? even : x[0], odd ? x[1] : even, odd ? other : x[2], odd ? x[3] : other};
    const auto first = __shfl_xor_sync(~0u, upper ? y[0] : y[2], 2);
    const auto second = __shfl_xor_sync(~0u, upper ? y[1] : y[3], 2);
    const uint4 value = upper ? uint4{first, second, y[2], y[3]} : uint4{y[0], y[1], first, second};
    if (inside) *reinterpret_cast<uint4*>(row + 8 * (j + threadIdx.x % 4)) = value;
  }
}

// Of four pairs of numbers with the product's d: a and b become da and db, and y is made. What is done is
// that of the kernels of ops/swiglu.
template <bool kHasB>
__device__ void differentiate(const float (&d)[8], std::uint32_t (&a)[4], std::uint32_t (&b)[4],
                              std::uint32_t (&y)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float da[2], db[2], ys[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float a_e = e ? high(a[i]) : low(a[i]), s = sigmoid(a_e), silu = a_e * s;
      const float factor = kHasB ? e ? high(b[i]) : low(b[i]) : 1, d_e = d[2 * i + e];
      da[e] = d_e * factor * (s + silu * (1 - s));
      db[e] = d_e * silu;
      ys[e] = silu * factor;
    }
    a[i] = pack(da[0], da[1]);
    if constexpr (kHasB) b[i] = pack(db[0], db[1]);
    y[i] = pack(ys[0], ys[1]);
  }
}

// The sums of a lane's two columns over a warp's 16 rows, in shared memory.
[[maybe_unused]] __device__ float2 sum_of_rows(const char* box) {
  const int lane = threadIdx.x % 32;
  float2 sum{0, 0};
#pragma unroll
  for (int row = 0; row < 16; ++row) {
    const int at = row * 128 + ((lane / 4 ^ row % 8) << 4) + lane % 4 * 4;
    const auto pair = *reinterpret_cast<const std::uint32_t*>(box + at);
    sum.x += low(pair), sum.y += high(pair);
  }
  return sum;
}

// The gradients of a tile, the warpgroup's n-th, from its d.
template <class C>
__device__ void finish_backward(const Work& work, Chunks<C>& chunks, int n,
                                const float (&d)[C::kHalves][C::kColumns / 2], const Tile<C>& tile) {
  constexpr int kChunks = kAcross * C::kHalves;
  const int lane = threadIdx.x % 32;
  float2 sums[kAcross] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int number = n * kChunks + c, half = c / kAcross, across = c % kAcross;
    const int first = tile.row * C::kRows + half * 64 + chunks.warp * 16;
    const int block = tile.column * kAcross + across;
    char* const box = chunks.sets + number % 2 * kSetBytes;  // a's, then b's
    chunks.full[number % 2].wait(number / 2);
    std::uint32_t ys[8][2];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      // Row lane % 16, unit j + lane / 16 of 16 bytes.
      const std::uint32_t at =
          shared_address(box) + (lane & 15) * 128 + (((j + (lane >> 4)) ^ (lane & 7)) << 4);
      std::uint32_t a[4], b[4], y[4];
      load_matrices<false>(a, at);
      if constexpr (C::kHasB) load_matrices<false>(b, at + kWarpBoxBytes);
      differentiate<C::kHasB>(reinterpret_cast<const float (&)[8]>(d[half][4 * (8 * across + j)]), a, b, y);
      store_matrices<false>(a, at);
      store_matrices<false>(C::kHasB ? b : y, at + kWarpBoxBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) ys[j + i / 2][i % 2] = y[i];
    }
    written_for_copies();
    __syncwarp();
    if (lane == 0) {
      copy_tile_back(work.da, first, block, box);
      if constexpr (C::kHasB) {
        copy_tile_back(work.db, first, block, box + kWarpBoxBytes);
      } else {
        if (work.y != nullptr) copy_tile_back(work.to_y, first, block, box + kWarpBoxBytes);
      }
      commit_copies_back();
    }
    __syncwarp();
    if (C::kHasB && work.y != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + lane / 4 + 8 * i;
        store_row(work.y + std::int64_t{row} * work.F + block * 64, row < work.M && block * 64 < work.F,
                  [&](int j) { return ys[j][i]; });
      }
    }
    if (work.sums != nullptr) {  // of both halves' rows; those behind the last are zero, as d is
      const float2 sum = sum_of_rows(box);
      sums[across].x += sum.x, sums[across].y += sum.y;
      if (half == C::kHalves - 1 && block * 64 < work.F) {
        const std::int64_t row = tile.row * 4 + chunks.warp;
        *reinterpret_cast<float2*>(work.sums + row * work.F + block * 64 + lane * 2) = sums[across];
      }
      __syncwarp();
    }
    if (lane == 0) {
      wait_for_copies_back();
      chunks.order(number + 2);
    }
    __syncwarp();
  }
}

// The part of the multiplying warpgroups.
template <class C>
__device__ void multiply_and_finish(const Work& work, const char* resident, const char* stages,
                                    char* of_warps, Shared<C::kStages>& shared) {
  const int warpgroup = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int number = warpgroup * 4 + warp;
  char* const mine = of_warps + number * C::kWarpBytes;
  Chunks<C> chunks{work, mine, shared.chunks[number], warpgroup, warp};
  if constexpr (!C::kForward) {
    if (lane == 0) chunks.order(0), chunks.order(1);
    __syncwarp();
  }
  const auto release = [&](int stage) {
    if (lane == 0) shared.empty[stage].arrive();
  };
  Tile<C> tile{work};
  if (warpgroup == 1) named_arrive(1, kMultiplying);
  for (int i = warpgroup, n = 0; tile.find(i); i += 2, ++n) {
    if (C::kResident && n == 0) shared.resident.wait(0);
    float d[C::kHalves][C::kColumns / 2];
    RingPlace<C::kStages> place(i * work.depth);
    int previous = 0;
    // In turns: then a barrier's phase before the one that is waited for is over, as a wait needs.
    named_wait(1 + warpgroup, kMultiplying);
    for (int k = 0; k < work.depth; ++k) {
      shared.full[place.stage].wait(place.phase);
      const char* const rows = stages + place.stage * C::kStageBytes;
      const char* const weight = C::kResident ? resident + k * C::kWeightBytes : rows + C::kRowsBytes;
      products_begin();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
          multiply<false, !C::kForward>(d[half], operand<false>(rows + half * kBoxBytes, step),
                                        operand<!C::kForward>(weight, step), k + step > 0);
        }
      }
      products_commit();
      if (k > 0) {
        products_wait<1>();
        release(previous);
      }
      previous = place.stage;
      place.advance();
    }
    named_arrive(2 - warpgroup, kMultiplying);
    products_wait<0>();
    release(previous);
    if constexpr (C::kForward) {
#pragma unroll
      for (int half = 0; half < C::kHalves; ++half)
        finish_forward<C>(work, mine, d[half], tile.row * C::kRows + half * 64, tile.column);
    } else {
      finish_backward<C>(work, chunks, n, d, tile);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) products(const __grid_constant__ Work work) {
  if constexpr (kForHopper) {
    extern __shared__ char shared_bytes[];
    char* const resident = shared_bytes + (-shared_address(shared_bytes) & 1023);
    char* const stages = resident + C::kResidentBytes;
    char* const of_warps = stages + C::kStages * C::kStageBytes;
    auto& shared = *reinterpret_cast<Shared<C::kStages>*>(of_warps + 8 * C::kWarpBytes);
    static_assert(sizeof shared <= 512);
    if (threadIdx.x == 0) {
      for (int i = 0; i < C::kStages; ++i) shared.full[i].start(1), shared.empty[i].start(4);  // warps
      shared.resident.start(1);
      for (auto& sets : shared.chunks) sets[0].start(1), sets[1].start(1);
      barriers_are_started();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
      take_registers<232>();
      multiply_and_finish<C>(work, resident, stages, of_warps, shared);
    } else {
      give_registers<40>();
      if (threadIdx.x == 0) copy_for_products<C>(work, resident, stages, shared);
    }
  }
}

CUtensorMap matrix_map(const Bfloat16* matrix, std::int64_t rows, std::int64_t columns, std::int64_t pitch,
                       int box_rows, int box_blocks) {
  return cuda::matrix_map("product_swiglu", matrix, rows, columns, pitch, box_rows, box_blocks);
}

template <class C>
void launch_tiles(Work& work, std::int64_t M, std::int64_t K, std::int64_t F, cudaStream_t stream) {
  constexpr int kGroupRows = 2048;
  work.M = static_cast<int>(M), work.F = static_cast<int>(F), work.depth = static_cast<int>(K / kDepth);
  const std::int64_t rows = ceil_div(M, C::kRows), columns = ceil_div(F, C::kFeatures);
  work.rows = static_cast<int>(rows), work.columns = static_cast<int>(columns);
  work.group = kGroupRows / C::kRows;
  const std::int64_t blocks = C::kResident
                                  ? std::clamp<std::int64_t>(multiprocessors() / columns, 1, rows) * columns
                                  : std::min(multiprocessors(), rows * columns);
  allow_shared_memory(products<C>, C::kBytes);
  products<C><<<grid_size(blocks), kThreads, C::kBytes, stream>>>(work);
}

template <bool kResident>
void launch_forward(const ProductSwiglu& p, cudaStream_t stream) {
  using C = Config<true, true, kResident>;
  Work work{.x = matrix_map(p.x, p.M, p.K, p.K, C::kRows, 1),
            .weight = matrix_map(p.weight, 2 * p.F, p.K, p.K, C::kFeatures, 1),
            .both = p.both,
            .y = p.y};
  launch_tiles<C>(work, p.M, p.K, p.F, stream);
}

template <bool kHasB, bool kResident>
void launch_backward(const ProductSwigluGradients& p, cudaStream_t stream) {
  using C = Config<false, kHasB, kResident>;
  const auto of_warp = [&](const Bfloat16* x, std::int64_t pitch) {
    return x == nullptr ? CUtensorMap{} : matrix_map(x, p.M, p.F, pitch, 16, 1);
  };
  Work work{.x = matrix_map(p.dy, p.M, p.K, p.K, C::kRows, 1),
            .weight = matrix_map(p.weight, p.K, p.F, p.F, kDepth, kAcross),
            .a = of_warp(p.a, p.a_step),
            .b = of_warp(p.b, p.b_step),
            .da = of_warp(p.da, p.d_step),
            .db = of_warp(p.db, p.d_step),
            .to_y = of_warp(p.y, p.F),
            .y = p.y,
            .sums = p.sums};
  launch_tiles<C>(work, p.M, p.K, p.F, stream);
}

bool stays(std::int64_t K) {
  return K <= kMostResident;
}

}  // namespace

bool has_product_swiglu() {
  return has_hopper_code();
}

void product_swiglu(const ProductSwiglu& p, cudaStream_t stream) {
  stays(p.K) ? launch_forward<true>(p, stream) : launch_forward<false>(p, stream);
}

std::int64_t product_swiglu_sums(std::int64_t M, std::int64_t K) {
  return 4 * ceil_div(M, stays(K) ? 64 : 128);  // of each tile's warps
}

void product_swiglu_gradients(const ProductSwigluGradients& p, cudaStream_t stream) {
  if (p.b != nullptr) {
    stays(p.K) ? launch_backward<true, true>(p, stream) : launch_backward<true, false>(p, stream);
  } else {
    stays(p.K) ? launch_backward<false, true>(p, stream) : launch_backward<false, false>(p, stream);
  }
}

}  // namespace megalodon::ops::cuda
