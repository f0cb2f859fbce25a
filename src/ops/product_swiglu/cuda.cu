#include "ops/product_swiglu/cuda.h"

#include <algorithm>

#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_mma.h"
#include "ops/cuda_tensor_map.h"
#include "ops/swiglu/cuda_sigmoid.h"

// A block goes through tiles of the product: a warpgroup copies, two or three multiply a tile each in turn,
// so that what one does with its sums falls into the others' products. Up to a depth of kMostResident the
// weight of the block's columns stays in shared memory and its tiles are below each other; a ring carries the
// rest. Backward, a and b come into a second ring, far ahead, and leave it as da and db.
namespace megalodon::ops::cuda {
namespace {

constexpr int kDepth = 64, kMostResident = kMostResidentDepth;  // of a stage; of a weight that stays
constexpr int kBoxBytes = 64 * 128;                             // 64 rows of 64 numbers
constexpr int kAcross = 2;                                      // backward: boxes in a tile's columns
constexpr int kOutColumns = 32, kOutBoxes = 2;  // forward: of a warpgroup's boxes on their way to memory

template <bool kForward_, bool kHasB_, bool kResident_>
struct Config {
  static constexpr bool kForward = kForward_, kHasB = kHasB_, kResident = kResident_;
  static_assert(kHasB || !kForward);
  static constexpr int kWarpgroups = kForward && kResident ? 3 : 2,
                       kThreads = 128 * (1 + kWarpgroups);                 // that multiply
  static constexpr int kHalves = kResident ? 1 : 2, kRows = 64 * kHalves;  // of a tile
  static constexpr int kColumns = kForward && kResident ? 192 : 128;       // of the product in a tile
  static constexpr int kFeatures = kForward ? kColumns / 2 : kColumns;     // forward: a's, and as many of b
  static constexpr int kStages = !kResident ? (kForward ? 6 : 5) : kForward ? 7 : 8;
  static constexpr int kRowsBytes = kRows * 128, kWeightBytes = kColumns * 128;
  static constexpr int kStageBytes = kRowsBytes + (kResident ? 0 : kWeightBytes);
  static constexpr int kResidentBytes = kResident ? kWeightBytes * (kMostResident / kDepth) : 0;
  // Forward: a warpgroup's boxes. Backward: a ring of places for a and b, then da and db, of a chunk.
  static constexpr int kSlots = kForward ? kOutBoxes * kWarpgroups : 4;
  static constexpr int kSlotBytes = kForward ? 64 * kOutColumns * 2 : 2 * kBoxBytes;
  static constexpr int kChunks = kAcross * kHalves;  // of a tile
  static_assert(kForward || kChunks * kBoxBytes == kRows * kColumns * 2);
  static constexpr int kBytes = 1024 + kResidentBytes + kStages * kStageBytes + kSlots * kSlotBytes + 512;
  static_assert(kBytes <= 227 * 1024);
};

struct Work {
  CUtensorMap x, weight;
  CUtensorMap a{}, b{}, da{}, db{}, to_y{};  // boxes of a warpgroup
  bool has_factors = false, has_y = false;   // forward: whether a and b are wanted; and y
  Bfloat16* y = nullptr;                     // backward: [M, F], null where it is not wanted
  float* sums = nullptr;                     // backward: of a warp's rows of da, or null
  int M = 0, F = 0, depth = 0;               // depth: stages
  int rows = 0, columns = 0, group = 0;      // tiles; rows of tiles in a group
};

template <class C>
struct Shared {
  Barrier full[C::kStages], empty[C::kStages], resident, came[C::kSlots], used[C::kSlots];
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

// The part of the thread that copies what is multiplied.
template <class C>
__device__ void copy_for_products(const Work& work, char* resident, char* stages, Shared<C>& shared) {
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

// What a warpgroup makes of its rows, to memory by way of boxes in shared memory.
template <class C>
class Outputs {
 public:
  __device__ Outputs(const Work& work, char* boxes, int warpgroup, int warp)
      : work_(work), boxes_(boxes), warpgroup_(warpgroup) {
    const int lane = threadIdx.x % 32, row = lane & 15;
    leads_ = warp == 0 && lane == 0;
    place_ = (warp * 16 + row) * kOutColumns * 2 + ((lane >> 4 ^ row / 2 % 4) << 4);
  }

  // a, b and y of 64 rows from `row` on.
  __device__ void finish(const float (&d)[C::kColumns / 2], int row, int column) {
#pragma unroll
    for (int i = 0; i < C::kFeatures / kOutColumns; ++i) {
      const int block = column * (C::kFeatures / kOutColumns) + i;
      Words a, b, y;
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const int n = 16 * i + 2 * w;
        a[w] = pack(d[n], d[n + 1]);
        b[w] = pack(d[C::kFeatures / 2 + n], d[C::kFeatures / 2 + n + 1]);
      }
      if (work_.has_factors) {
        send(work_.a, a, row, block);
        send(work_.b, b, row, block);
      }
      if (!work_.has_y) continue;
#pragma unroll
      for (int w = 0; w < 8; ++w)
        y[w] =
            pack(low(a[w]) * sigmoid(low(a[w])) * low(b[w]), high(a[w]) * sigmoid(high(a[w])) * high(b[w]));
      send(work_.to_y, y, row, block);
    }
  }
  __device__ void end() const {
    if (leads_) wait_for_copies_back();
  }

 private:
  using Words = std::uint32_t[8];  // 2 j + half: the thread's pair of columns 8 j + ... of its row + 8 half

  __device__ void send(const CUtensorMap& map, const Words& words, int row, int block) {
    char* const box = boxes_ + next_ * C::kSlotBytes;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const std::uint32_t four[4] = {words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]};
      store_matrices<false>(four, shared_address(box) + (place_ ^ j << 4));
    }
    written_for_copies();
    if (leads_) wait_for_copies_back<kOutBoxes - 2>();  // then the next box is free
    named_wait(4 + warpgroup_, 128);
    if (leads_) {
      copy_tile_back(map, row, block, box);
      commit_copies_back();
    }
    if (++next_ == kOutBoxes) next_ = 0;
  }

  const Work& work_;
  char* boxes_;
  int warpgroup_, place_, next_ = 0;  // the lane's place in a box
  bool leads_;
};

// Backward: 64 rows and 64 columns of a tile, the n-th of all the block's tiles.
template <class C>
struct Chunk {
  const Work& work;
  int row = 0, block = 0;

  // False behind the last.
  __device__ bool find(int n) {
    Tile<C> tile{work};
    if (!tile.find(n / C::kChunks)) return false;
    row = tile.row * C::kRows + n % C::kChunks / kAcross * 64;
    block = tile.column * kAcross + n % kAcross;
    return true;
  }
};

// The part of one of the three threads that copy chunks: from the first-th on each third goes to memory once
// it was used, and another comes to its slot.
template <class C>
__device__ void copy_chunks(const Work& work, char* slots, int first, Shared<C>& shared) {
  constexpr int kThreads = 3;
  Chunk<C> chunk{work};
  const auto bring = [&](int n) {
    if (!chunk.find(n)) return;
    char* const slot = slots + n % C::kSlots * C::kSlotBytes;
    Barrier& came = shared.came[n % C::kSlots];
    came.arrive_expecting(C::kHasB ? 2 * kBoxBytes : kBoxBytes);
    copy_tile(slot, work.a, chunk.row, chunk.block, came);
    if constexpr (C::kHasB) copy_tile(slot + kBoxBytes, work.b, chunk.row, chunk.block, came);
  };
  for (int n = first; n < C::kSlots; n += kThreads) bring(n);
  for (int n = first; chunk.find(n); n += kThreads) {
    const char* const slot = slots + n % C::kSlots * C::kSlotBytes;
    shared.used[n % C::kSlots].wait(n / C::kSlots);
    copy_tile_back(work.da, chunk.row, chunk.block, slot);
    if constexpr (C::kHasB) {
      copy_tile_back(work.db, chunk.row, chunk.block, slot + kBoxBytes);
    } else {
      if (work.y != nullptr) copy_tile_back(work.to_y, chunk.row, chunk.block, slot + kBoxBytes);
    }
    commit_copies_back();
    wait_for_copies_back();
    bring(n + C::kSlots);
  }
}

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

// The gradients of a tile, the block's `number`-th, from its d.
template <class C>
__device__ void finish_backward(const Work& work, char* slots, Shared<C>& shared, int number,
                                const float (&d)[C::kHalves][C::kColumns / 2], const Tile<C>& tile) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float2 sums[kAcross] = {};
#pragma unroll
  for (int c = 0; c < C::kChunks; ++c) {
    const int n = number * C::kChunks + c, half = c / kAcross, across = c % kAcross;
    const int first = tile.row * C::kRows + half * 64 + warp * 16, block = tile.column * kAcross + across;
    const char* const rows = slots + n % C::kSlots * C::kSlotBytes + warp * 16 * 128;  // the warp's, of a
    shared.came[n % C::kSlots].wait(n / C::kSlots);
    std::uint32_t ys[8][2];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      // Row lane % 16, unit j + lane / 16 of 16 bytes.
      const std::uint32_t at =
          shared_address(rows) + (lane & 15) * 128 + (((j + (lane >> 4)) ^ (lane & 7)) << 4);
      std::uint32_t a[4], b[4], y[4];
      load_matrices<false>(a, at);
      if constexpr (C::kHasB) load_matrices<false>(b, at + kBoxBytes);
      differentiate<C::kHasB>(reinterpret_cast<const float (&)[8]>(d[half][4 * (8 * across + j)]), a, b, y);
      store_matrices<false>(a, at);
      store_matrices<false>(C::kHasB ? b : y, at + kBoxBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) ys[j + i / 2][i % 2] = y[i];
    }
    if (work.sums != nullptr) {  // of both halves' rows; those behind the last are zero, as d is
      __syncwarp();
      const float2 sum = sum_of_rows(rows);
      sums[across].x += sum.x, sums[across].y += sum.y;
      if (half == C::kHalves - 1 && block * 64 < work.F) {
        const std::int64_t row = tile.row * 4 + warp;
        *reinterpret_cast<float2*>(work.sums + row * work.F + block * 64 + lane * 2) = sums[across];
      }
    }
    written_for_copies();
    __syncwarp();
    if (lane == 0) shared.used[n % C::kSlots].arrive();
    if (C::kHasB && work.y != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + lane / 4 + 8 * i;
        store_row(work.y + std::int64_t{row} * work.F + block * 64, row < work.M && block * 64 < work.F,
                  [&](int j) { return ys[j][i]; });
      }
    }
  }
}

// The part of the multiplying warpgroups.
template <class C>
__device__ void multiply_and_finish(const Work& work, const char* resident, const char* stages, char* slots,
                                    Shared<C>& shared) {
  const int warpgroup = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  [[maybe_unused]] Outputs<C> outputs(work, slots + warpgroup * kOutBoxes * C::kSlotBytes, warpgroup, warp);
  const auto release = [&](int stage) {
    if (lane == 0) shared.empty[stage].arrive();
  };
  Tile<C> tile{work};
  // In turns: then a barrier's phase before the one that is waited for is over, as a wait needs.
  constexpr int kProducts = 1, kChunks = 4;  // named barriers, one a warpgroup
  const auto wait_for_turn = [&](int of) { named_wait(of + warpgroup, 256); };
  const auto give_turn = [&](int of) { named_arrive(of + (warpgroup + 1) % C::kWarpgroups, 256); };
  if (warpgroup == C::kWarpgroups - 1) {
    give_turn(kProducts);
    if constexpr (!C::kForward) give_turn(kChunks);
  }
  for (int i = warpgroup; tile.find(i); i += C::kWarpgroups) {
    if (C::kResident && i == warpgroup) shared.resident.wait(0);
    float d[C::kHalves][C::kColumns / 2];
    RingPlace<C::kStages> place(i * work.depth);
    int previous = 0;
    wait_for_turn(kProducts);
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
    give_turn(kProducts);
    products_wait<0>();
    release(previous);
    if constexpr (C::kForward) {
#pragma unroll
      for (int half = 0; half < C::kHalves; ++half)
        outputs.finish(d[half], tile.row * C::kRows + half * 64, tile.column);
    } else {
      wait_for_turn(kChunks);
      finish_backward<C>(work, slots, shared, i, d, tile);
      give_turn(kChunks);
    }
  }
  if constexpr (C::kForward) outputs.end();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) products(const __grid_constant__ Work work) {
  if constexpr (kForHopper) {
    extern __shared__ char shared_bytes[];
    char* const resident = shared_bytes + (-shared_address(shared_bytes) & 1023);
    char* const stages = resident + C::kResidentBytes;
    char* const slots = stages + C::kStages * C::kStageBytes;
    auto& shared = *reinterpret_cast<Shared<C>*>(slots + C::kSlots * C::kSlotBytes);
    static_assert(sizeof shared <= 512);
    if (threadIdx.x == 0) {
      for (int i = 0; i < C::kStages; ++i) shared.full[i].start(1), shared.empty[i].start(4);  // warps
      shared.resident.start(1);
      for (int i = 0; i < C::kSlots; ++i) shared.came[i].start(1), shared.used[i].start(4);
      barriers_are_started();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
      take_registers<C::kWarpgroups == 3 ? 160 : 232>();
      multiply_and_finish<C>(work, resident, stages, slots, shared);
    } else {
      give_registers<C::kWarpgroups == 3 ? 24 : 40>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x == 0) copy_for_products<C>(work, resident, stages, shared);
      if constexpr (!C::kForward) {
        if (warp > 0 && threadIdx.x % 32 == 0) copy_chunks<C>(work, slots, warp - 1, shared);
      }
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
  products<C><<<grid_size(blocks), C::kThreads, C::kBytes, stream>>>(work);
}

template <bool kResident>
void launch_forward(const ProductSwiglu& p, cudaStream_t stream) {
  using C = Config<true, true, kResident>;
  const auto of_warpgroup = [&](const Bfloat16* to, std::int64_t pitch) {
    return tensor_map("product_swiglu", to,
                      {.sizes = {kOutColumns, p.M, p.F / kOutColumns},
                       .strides = {pitch, kOutColumns},
                       .box = {kOutColumns, 64, 1},
                       .swizzle = CU_TENSOR_MAP_SWIZZLE_64B,
                       .promotion = CU_TENSOR_MAP_L2_PROMOTION_NONE});
  };
  Work work{.x = matrix_map(p.x, p.M, p.K, p.K, C::kRows, 1),
            .weight = matrix_map(p.weight, 2 * p.F, p.K, p.K, C::kFeatures, 1),
            .has_factors = p.both != nullptr,
            .has_y = p.y != nullptr};
  if (work.has_y) work.to_y = of_warpgroup(p.y, p.F);
  if (work.has_factors) work.a = of_warpgroup(p.both, 2 * p.F), work.b = of_warpgroup(p.both + p.F, 2 * p.F);
  launch_tiles<C>(work, p.M, p.K, p.F, stream);
}

template <bool kHasB, bool kResident>
void launch_backward(const ProductSwigluGradients& p, cudaStream_t stream) {
  using C = Config<false, kHasB, kResident>;
  const auto of_warpgroup = [&](const Bfloat16* x, std::int64_t pitch) {
    return x == nullptr ? CUtensorMap{} : matrix_map(x, p.M, p.F, pitch, 64, 1);
  };
  Work work{.x = matrix_map(p.dy, p.M, p.K, p.K, C::kRows, 1),
            .weight = matrix_map(p.weight, p.K, p.F, p.F, kDepth, kAcross),
            .a = of_warpgroup(p.a, p.a_step),
            .b = of_warpgroup(p.b, p.b_step),
            .da = of_warpgroup(p.da, p.d_step),
            .db = of_warpgroup(p.db, p.d_step),
            .to_y = of_warpgroup(p.y, p.F),
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
