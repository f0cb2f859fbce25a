#pragma once
#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/cema/cuda.h"
#include "ops/cema/cuda_boxes.h"
#include "ops/cuda_barrier.h"
#include "ops/cuda_mma.h"

// The pieces of CEMA in blocks (cuda_blocks.cu): complex numbers, coefficients, tiles of steps in shared
// memory and the scan of the states over the blocks. A thread block has kFeatures features, a warp of workers
// each, and warps of movers.
namespace megalodon::ops::cuda {

inline constexpr int kBlock = 32, kSteps = static_cast<int>(kCemaTile), kRun = 4;  // steps, steps, blocks
inline constexpr int kFeatures = static_cast<int>(kCemaTileFeatures);
inline constexpr int kComponents = static_cast<int>(kMostBlockComponents);
inline constexpr int kHalf = kComponents / 2;  // a lane has components lane / 4 of both halves
inline constexpr int kWorkers = 32 * kFeatures, kMovers = 128, kThreads = kWorkers + kMovers;

struct alignas(8) Pair {
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
__device__ inline Pair multiply_add(float a, Pair b, Pair c) {
  return {c.re + a * b.re, c.im + a * b.im};
}
// Of no effect beside numbers of any use, but to be divided by.
__device__ inline Pair nonzero(Pair x) {
  return fabsf(x.re) < 1e-30F && fabsf(x.im) < 1e-30F ? Pair{1e-30F, 0} : x;
}
__device__ inline Pair divide(Pair a, Pair b) {
  const float size = hypotf(b.re, b.im);
  return multiply({a.re / size, a.im / size}, {b.re / size, -b.im / size});
}

// Of a feature's components: decays over a block, and over one and two runs of blocks.
using Decays = Pair[3][kComponents];

// Those of component n. In float64 between: states are multiplied with them along the sequence.
__device__ inline void make_decays(Pair q, int n, Decays& to) {
  double re = q.re, im = q.im;
  static_assert(kBlock == 1 << 5 && kRun == 1 << 2);
#pragma unroll
  for (int row = 0; row < 3; ++row) {
#pragma unroll
    for (int i = row == 0 ? 5 : row == 1 ? 2 : 1; i > 0; --i) {
      const double next = re * re - im * im;
      im = 2 * re * im, re = next;
    }
    to[row][n] = {static_cast<float>(re), static_cast<float>(im)};
  }
}

// The coefficients of a feature in shared memory, components past N zero.
struct FeatureCoefficients {
  Pair q[kComponents], eta[kComponents];
  float p[kComponents], omega;

  // Those of feature d, by a warp and past the first cache. Whether they are not what was here.
  __device__ bool read(const CemaShape& s, const CemaCoefficients& c, std::int64_t d, int lane) {
    const int n = lane % kComponents;
    const std::int64_t from = d * s.N + n;
    const bool there = n < s.N;
    const auto pair = [&](const float* x) {
      const float2 value = there ? __ldcg(reinterpret_cast<const float2*>(x) + from) : float2{0, 0};
      return Pair{value.x, value.y};
    };
    const float p_n = there ? __ldcg(c.p + from) : 0, omega_d = __ldcg(c.omega + d);
    const Pair q_n = pair(c.q), eta_n = pair(c.eta);
    const auto bits = [](float a, float b) { return __float_as_uint(a) ^ __float_as_uint(b); };
    const std::uint32_t changed = bits(p_n, p[n]) | bits(omega_d, omega) | bits(q_n.re, q[n].re) |
                                  bits(q_n.im, q[n].im) | bits(eta_n.re, eta[n].re) |
                                  bits(eta_n.im, eta[n].im);
    __syncwarp();
    p[n] = p_n, q[n] = q_n, eta[n] = eta_n, omega = omega_d;
    __syncwarp();
    return __any_sync(~0u, changed != 0);
  }
  // p conj(eta)
  __device__ Pair weight(int n) const { return {p[n] * eta[n].re, -p[n] * eta[n].im}; }
};

// A tile [step, feature] as on the device, where the 16-byte halves of steps 4 .. 7 of 8 have changed places.
using Rows = uint4[2 * kSteps];
// The same as [feature, block, step]. 16 bytes follow every four blocks, and eight features start at
// different banks.
inline constexpr int kFourBlocks = 4 * kBlock * 2 + 16;  // bytes
inline constexpr int kColumn = (kSteps / (4 * kBlock) * kFourBlocks + 16 + 127) / 128 * 128 - 16;
using Columns = uint4[kFeatures * kColumn / 16];

__device__ inline std::uint32_t column(const Columns& columns, int feature) {
  return shared_address(columns) + feature * kColumn;
}

// Moves a tile between rows and columns, a warp of the movers four blocks. Columns may have the blocks, or
// the steps of each block, in the opposite order.
template <bool kBlocksBack, bool kStepsBack>
struct Move {
  static_assert(kMovers / 32 * 4 * kBlock == kSteps);
  static constexpr int kTogether = 2;  // instructions on their way

  int warp, lane;  // of the movers

  // The lane's row of four matrices of 8 x 8 numbers: of 8 features, then of the others, of 8 steps, then of
  // the next.
  __device__ std::uint32_t in_rows(const Rows& rows) const {
    const int row = lane % 8, half = lane / 8 % 2, eighth = lane / 16, step = kStepsBack ? 7 - row : row;
    return shared_address(rows) + (4 * kBlock * warp + 8 * eighth + step) * 32 + (half ^ (step / 4)) * 16;
  }
  __device__ std::uint32_t in_columns(const Columns& columns) const {
    const int row = lane % 8, half = lane / 8 % 2, eighth = lane / 16;
    return column(columns, 8 * half + row) + (kBlocksBack ? 3 - warp : warp) * kFourBlocks +
           16 * (kStepsBack ? 1 - eighth : eighth);
  }
  // Bytes from there to the i-th 16 steps.
  __device__ static constexpr int further(int i) {
    return (kBlocksBack ? 3 - i / 2 : i / 2) * 2 * kBlock + (kStepsBack ? 1 - i % 2 : i % 2) * 32;
  }
  __device__ void to_columns(const Rows& rows, const Columns& columns) const {
    const std::uint32_t from = in_rows(rows), to = in_columns(columns);
#pragma unroll
    for (int first = 0; first < 8; first += kTogether) {
      std::uint32_t words[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) load_matrices<false>(words[i], from + (first + i) * 512);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) store_matrices<true>(words[i], to + further(first + i));
    }
  }
  __device__ void to_rows(const Columns& columns, const Rows& rows) const {
    const std::uint32_t from = in_columns(columns), to = in_rows(rows);
#pragma unroll
    for (int first = 0; first < 8; first += kTogether) {
      std::uint32_t words[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) load_matrices<true>(words[i], from + further(first + i));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) store_matrices<false>(words[i], to + (first + i) * 512);
    }
  }
};

// The lane's row, in bytes from a column on, of four matrices of 8 blocks x 8 steps: those of steps 8 i ..
// and, in rows 2 c and 2 c + 1, blocks 4 c + 2 t and the next. In the order 2 i + t where kLeft, as left-hand
// matrices have them, else 2 t + i, as pairs of right-hand ones.
template <bool kLeft>
__device__ inline int row_of_blocks(int lane) {
  const int row = lane % 8, j = lane / 8, t = kLeft ? j % 2 : j / 2, i = kLeft ? j / 2 : j % 2;
  return (row / 2) * kFourBlocks + (2 * t + row % 2) * 2 * kBlock + i * 16;
}

using Blocks = std::uint32_t[2][4];  // for 16 steps each
__device__ inline void read_blocks(std::uint32_t from, Blocks& words) {
#pragma unroll
  for (int k = 0; k < 2; ++k) load_matrices<false>(words[k], from + 32 * k);
}
// The matrix q^e [8 components, e], the real above the imaginary parts, for e 0 .. 15 and 16 .. 31.
using Powers = std::uint32_t[2][4];
using Run = Pair[kRun];  // of a component, the blocks 4 (lane % 4) ..

// In shared memory a half's take 1024 bytes, matrices of 8 x 8 in the order e / 8, part; from: the lane's.
__device__ inline void read_powers(std::uint32_t from, Powers& powers) {
#pragma unroll
  for (int k = 0; k < 2; ++k) load_matrices<false>(powers[k], from + k * 512);
}
// e q^e; first: the lane's first two e.
__device__ inline void make_slopes(const Powers& powers, std::uint32_t first, Powers& slopes) {
  constexpr std::uint32_t kEights[4] = {0, 0x41004100, 0x41804180, 0x41c041c0};  // 8 i as bfloat16, twice
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t e = i == 0 ? first : add_pairs(first, kEights[i]);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int word = i % 2 * 2 + part;
      slopes[i / 2][word] = multiply_pairs(powers[i / 2][word], e);
    }
  }
}
__device__ inline void add_products(const Powers& powers, const Blocks& blocks, float (&sum)[2][4]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int t = 0; t < 2; ++t) multiply_add(sum[t], powers[k], blocks[k][2 * t], blocks[k][2 * t + 1]);
  }
}
__device__ inline void to_run(const float (&sum)[2][4], Run& run) {
#pragma unroll
  for (int t = 0; t < 2; ++t) run[2 * t] = {sum[t][0], sum[t][2]}, run[2 * t + 1] = {sum[t][1], sum[t][3]};
}
__device__ inline void multiply_powers(const Powers& powers, const Blocks& blocks, Run& run) {
  float sum[2][4] = {};
  add_products(powers, blocks, sum);
  to_run(sum, run);
}

// A state sum_t q^t u_t, t steps back from a block, and where kSlope its slope sum_t t q^t u_t.
template <bool kSlope>
struct State {
  Pair value{0, 0}, slope{0, 0};

  // After `steps` in which it decays and which add `more`.
  __device__ State after(Pair decay, float steps, const State& more) const {
    State to;
    if constexpr (kSlope) to.slope = multiply_add(decay, multiply_add(steps, value, slope), more.slope);
    to.value = multiply_add(decay, value, more.value);
    return to;
  }
  template <class F>
  __device__ State through(F&& f) const {
    State to{{f(value.re), f(value.im)}};
    if constexpr (kSlope) to.slope = {f(slope.re), f(slope.im)};
    return to;
  }
};

// What each block adds becomes the state before that block. The runs of blocks follow each other in the four
// lanes of a component. `end` in the last lane is the state before the first run, and becomes in each lane
// that after its run. decays: from the component on.
template <bool kSlope>
__device__ inline void scan_blocks(Run& value, Run& slope, const Pair (*decays)[kComponents],
                                   State<kSlope>& end, int lane) {
  const int place = lane % 4;
  const Pair of_block = *decays[0];
  State<kSlope> sum{value[0], slope[0]};
#pragma unroll
  for (int k = 1; k < kRun; ++k) sum = sum.after(of_block, kBlock, {value[k], slope[k]});
  if (place == 3) sum = end;
  State<kSlope> before = sum.through([&](float x) { return __shfl_sync(~0u, x, place + 3, 4); });  // modulo 4
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const auto earlier = before.through([&](float x) { return __shfl_up_sync(~0u, x, 1 << j, 4); });
    Pair decay = *decays[j + 1];
    if (place < 1 << j) decay = {0, 0};  // nothing is earlier than the first lanes
    before = earlier.after(decay, kBlock * kRun << j, before);
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const auto after = before.after(of_block, kBlock, {value[k], slope[k]});
    value[k] = before.value, slope[k] = before.slope;
    before = after;
  }
  end = before;
}

}  // namespace megalodon::ops::cuda
