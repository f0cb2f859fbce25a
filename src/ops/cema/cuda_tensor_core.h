#pragma once
#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/cema/cuda.h"
#include "ops/cema/cuda_boxes.h"
#include "ops/cuda_barrier.h"
#include "ops/cuda_mma.h"

// The pieces of CEMA in blocks (cuda_blocks.cu): complex numbers, coefficients, tiles of steps in shared
// memory and the scan of the states over the blocks. A thread block has kFeatures features, a warp each.
namespace megalodon::ops::cuda {

inline constexpr int kBlock = 32;  // steps
inline constexpr int kFeatures = static_cast<int>(kCemaTileFeatures), kThreads = 32 * kFeatures;
inline constexpr int kComponents = static_cast<int>(kMostBlockComponents);

// a and b as sums of two bfloat16 numbers each, packed.
__device__ inline void split(float a, float b, std::uint32_t& high, std::uint32_t& low) {
  high = pack(a, b);
  low = pack(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000));
}

struct Pair {
  float re, im;
};
__device__ inline Pair conjugate(Pair a) {
  return {a.re, -a.im};
}
__device__ inline Pair multiply(Pair a, Pair b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ inline Pair multiply_add(Pair a, Pair b, Pair c) {
  return {c.re + a.re * b.re - a.im * b.im, c.im + a.re * b.im + a.im * b.re};
}

// exponent in 0 .. 31
__device__ inline Pair power(Pair q, int exponent) {
  Pair result{1, 0};
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    if ((exponent >> bit) % 2 == 1) result = multiply(result, q);
    q = multiply(q, q);
  }
  return result;
}

// Decays of a feature's components over a block, then over 1, 2, 4, .. runs of blocks, and, last, zero.
template <int kPowers>
using Decays = Pair[kPowers + 2][kComponents];

// Those of component n, for runs of four blocks. In float64 between: states are multiplied with them along
// the sequence.
template <int kRows>
__device__ void make_decays(Pair q, int n, Pair (&to)[kRows][kComponents]) {
  double re = q.re, im = q.im;
  const auto square = [&](int times) {
#pragma unroll 1
    for (int i = 0; i < times; ++i) {
      const double next = re * re - im * im;
      im = 2 * re * im, re = next;
    }
    return Pair{static_cast<float>(re), static_cast<float>(im)};
  };
  static_assert(kBlock == 1 << 5);
#pragma unroll 1
  for (int row = 0; row < kRows - 1; ++row) to[row][n] = square(row == 0 ? 5 : row == 1 ? 2 : 1);
  to[kRows - 1][n] = {0, 0};
}

// The coefficients of a thread block's features in shared memory, components past N zero.
struct CoefficientMemory {
  float p[kFeatures][kComponents];
  Pair q[kFeatures][kComponents], eta[kFeatures][kComponents];

  __device__ void read(const CemaShape& s, const CemaCoefficients& c, std::int64_t first_feature) {
    for (int i = static_cast<int>(threadIdx.x); i < kFeatures * kComponents; i += kThreads) {
      const int feature = i / kComponents, n = i % kComponents;
      const bool there = n < s.N;
      const std::int64_t from = (first_feature + feature) * s.N + n;
      p[feature][n] = there ? c.p[from] : 0;
      q[feature][n] = there ? Pair{c.q[2 * from], c.q[2 * from + 1]} : Pair{0, 0};
      eta[feature][n] = there ? Pair{c.eta[2 * from], c.eta[2 * from + 1]} : Pair{0, 0};
    }
    __syncthreads();
  }
};

// A tile of kSteps steps in shared memory: `rows` [step, feature] as on the device, where the 16-byte halves
// of steps 4 .. 7 of 8 have changed places, and `columns` [feature, step], where 16 bytes follow every four
// blocks and features start at different banks. A warp moves the same kOwn steps between the two, all
// features.
template <int kSteps>
struct Tile {
  static constexpr int kOwn = kSteps / kFeatures;
  static constexpr int kFourBlocks = 4 * kBlock * 2 + 16;  // bytes
  static constexpr int kColumn = (kSteps / (4 * kBlock) * kFourBlocks + 127) / 128 * 128 + 128;
  using Rows = uint4[2 * kSteps];
  struct Memory {
    Rows rows;
    uint4 columns[kFeatures * kColumn / 16];
  };

  int warp, lane;
  std::uint32_t rows, columns;

  __device__ Tile(const Memory& memory)
      : warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        rows(shared_address(memory.rows)),
        columns(shared_address(memory.columns)) {}

  __device__ std::uint32_t column(int feature) const {
    return columns + feature * kColumn + 16 * (feature % 8);
  }
  // The lane's row of four matrices of 8 x 8 numbers: of 8 features, then of the others, of 8 steps, then of
  // the next. The warp's first 16 steps.
  __device__ std::uint32_t in_rows(std::uint32_t of) const {
    const int row = lane % 8, half = lane / 8 % 2, eighth = lane / 16;
    return of + (warp * kOwn + 8 * eighth + row) * 32 + (half ^ (row / 4)) * 16;
  }
  __device__ std::uint32_t in_columns() const {
    const int row = lane % 8, half = lane / 8 % 2, eighth = lane / 16;
    return column(8 * half + row) + warp * kOwn / (4 * kBlock) * kFourBlocks +
           warp * kOwn % (4 * kBlock) * 2 + 16 * eighth;
  }

  // Starts the copies of steps `step` on of a sequence. By one thread.
  __device__ void fetch(const Boxes& x, std::int64_t feature, std::int64_t step, std::int64_t sequence,
                        Barrier& barrier) const {
#pragma unroll
    for (int i = 0; i < kSteps; i += kBoxSteps)
      copy_box(x, static_cast<int>(feature), static_cast<int>(step) + i, static_cast<int>(sequence),
               rows + i * 32, barrier);
  }
  // The warp's steps of rows, which have arrived, into the columns.
  __device__ void to_columns() const {
    const std::uint32_t from = in_rows(rows), to = in_columns();
#pragma unroll
    for (int i = 0; i < kOwn / 16; ++i) {
      std::uint32_t words[4];
      load_matrices<false>(words, from + i * 512);
      store_matrices<true>(words, to + i * 32);
    }
  }
  // The warp's steps of the columns into rows that are then copied to the device.
  __device__ void to_rows(const Rows& leaving) const {
    const std::uint32_t from = in_columns(), to = in_rows(shared_address(leaving));
#pragma unroll
    for (int i = 0; i < kOwn / 16; ++i) {
      std::uint32_t words[4];
      load_matrices<true>(words, from + i * 32);
      store_matrices<false>(words, to + i * 512);
    }
    written_for_copies();
  }
};

// Components first, first + kApart, .. of a state.
template <int kCount, int kApart>
__device__ void read_state(Pair (&state)[kCount], int first, int N, const float* states, std::int64_t row) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int n = first + i * kApart;
    const float* const from = states + (row * N + n) * 2;
    state[i] = states != nullptr && n < N ? Pair{from[0], from[1]} : Pair{0, 0};
  }
}

// s[i][k], what block k of this lane's run adds to component i, becomes the state before that block. The runs
// follow each other from lane to lane, kApart apart, kLanes in all; kBack: from the last run and block to the
// first, with the conjugated decays. `end` in the last lane is the state before the first run, and becomes in
// each lane that after its run. of_runs: Decays from the lane's first component on, every fourth; of_block: a
// copy of their first row.
template <int kApart, int kLanes, bool kBack, int kCount, int kRun>
__device__ void scan_blocks(Pair (&s)[kCount][kRun], const Pair (&of_block)[kCount],
                            const Pair (*of_runs)[kComponents], Pair (&end)[kCount], int lane) {
  constexpr int kPowers = kLanes == 8 ? 3 : 2;
  static_assert(1 << kPowers == kLanes);
  const int here = lane / kApart % kLanes, place = kBack ? kLanes - 1 - here : here;
  const int before_lane = lane + ((here + (kBack ? 1 : kLanes - 1)) % kLanes - here) * kApart;
  const auto block = [](int k) { return kBack ? kRun - 1 - k : k; };
  const auto decay = [](Pair of) { return kBack ? conjugate(of) : of; };
  const auto of_earlier = [](float x, int lanes) {
    return kBack ? __shfl_down_sync(~0u, x, lanes, kApart * kLanes)
                 : __shfl_up_sync(~0u, x, lanes, kApart * kLanes);
  };
  Pair before[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Pair sum = s[i][block(0)];
#pragma unroll
    for (int k = 1; k < kRun; ++k) sum = multiply_add(decay(of_block[i]), sum, s[i][block(k)]);
    if (place == kLanes - 1) sum = end[i];
    before[i] = {__shfl_sync(~0u, sum.re, before_lane), __shfl_sync(~0u, sum.im, before_lane)};
  }
#pragma unroll
  for (int j = 0; j < kPowers; ++j) {
    const int row = place >= 1 << j ? j + 1 : kPowers + 1;  // nothing is earlier than the first lanes
    Pair earlier[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      earlier[i] = {of_earlier(before[i].re, kApart << j), of_earlier(before[i].im, kApart << j)};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      before[i] = multiply_add(decay(of_runs[row][4 * i]), earlier[i], before[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const Pair after = multiply_add(decay(of_block[i]), before[i], s[i][block(k)]);
      s[i][block(k)] = before[i];
      before[i] = after;
    }
    end[i] = before[i];
  }
}

}  // namespace megalodon::ops::cuda
