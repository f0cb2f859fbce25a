#pragma once
#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/cema/cuda.h"
#include "ops/cuda_device.h"

// The pieces of CEMA in blocks (cuda_blocks.cu): a tile of kBlocks blocks of kBlock steps of some features in
// shared memory, small matrices in registers, and the scan of the states over the blocks.
namespace megalodon::ops::cuda {

inline constexpr int kBlock = 32, kBlocks = 16;
static_assert(kBlock * kBlocks == kCemaTile);

struct Pair {
  float re, im;
};
__device__ inline Pair multiply(Pair a, Pair b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// exponent in 0 .. 32
__device__ inline Pair power(Pair q, int exponent) {
  Pair result{1, 0};
#pragma unroll
  for (int bit = 0; bit < 6; ++bit) {
    if ((exponent >> bit) % 2 == 1) result = multiply(result, q);
    q = multiply(q, q);
  }
  return result;
}

// Coefficients of some features in shared memory, components past N zero.
template <int kFeatures>
struct CoefficientMemory {
  float p[kFeatures][kMostBlockComponents];
  Pair q[kFeatures][kMostBlockComponents], eta[kFeatures][kMostBlockComponents];

  __device__ void read(const CemaShape& s, const CemaCoefficients& c, std::int64_t first_feature) {
    constexpr int kColumns = static_cast<int>(kMostBlockComponents);
    for (int i = static_cast<int>(threadIdx.x); i < kFeatures * kColumns; i += static_cast<int>(blockDim.x)) {
      const int feature = i / kColumns, n = i % kColumns;
      const bool there = n < s.N;
      const std::int64_t from = (first_feature + feature) * s.N + n;
      p[feature][n] = there ? c.p[from] : 0;
      q[feature][n] = there ? Pair{c.q[2 * from], c.q[2 * from + 1]} : Pair{0, 0};
      eta[feature][n] = there ? Pair{c.eta[2 * from], c.eta[2 * from + 1]} : Pair{0, 0};
    }
    __syncthreads();
  }
};

// q to a power that is one of 2, in float64 between: it is multiplied with itself along the sequence.
__device__ inline Pair power_in_double(Pair q, int exponent) {
  double re = q.re, im = q.im;
  for (; exponent > 1; exponent /= 2) {
    const double square = re * re - im * im;
    im = 2 * re * im, re = square;
  }
  return {static_cast<float>(re), static_cast<float>(im)};
}

__device__ inline std::uint32_t tf32_bits(float x) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ inline float to_tf32(float x) {
  return __uint_as_float(tf32_bits(x));
}

// c [16, 8] += a [16, 8] b [8, 8]. Lane 4 r + i holds of a the elements (r, i), (r + 8, i), (r, i + 4), (r +
// 8, i + 4), of b (i, r), (i + 4, r), of c (r, 2 i), (r, 2 i + 1), (r + 8, 2 i), (r + 8, 2 i + 1).
__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], float2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;");
}
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A tile in shared memory: words of two features; steps and blocks are apart so that the 32 lanes that read
// one feature of 8 blocks and 4 steps find 32 banks.
template <int kFeatures>
struct TileWords {
  static constexpr int kStep = kFeatures / 2 + 1, kOfBlock = kBlock * kStep + 4, kAll = kBlocks * kOfBlock;
  __device__ static int of(int step) { return step / kBlock * kOfBlock + step % kBlock * kStep; }
};

// The tiles of kFeatures features from first_feature on of sequence b, in arrays [B, L, D].
template <int kFeatures>
struct TileMemory {
  std::int64_t L, D, b, first_feature;

  __device__ std::int64_t at(std::int64_t tile, int step) const {
    return (b * L + tile * kCemaTile + step) * D + first_feature;
  }
  // Starts the copies of this thread, a word each. Both need kThreads threads.
  template <int kThreads>
  __device__ void fetch(const Bfloat16* x, std::int64_t tile, std::uint32_t* to) const {
    constexpr int kWords = kFeatures / 2, kSteps = kThreads / kWords;  // steps that all threads copy together
    static_assert(kSteps % kBlock == 0);
    const int step = static_cast<int>(threadIdx.x) / kWords, word = static_cast<int>(threadIdx.x) % kWords;
    const Bfloat16* from = x + at(tile, step) + 2 * word;
    auto target =
        static_cast<std::uint32_t>(__cvta_generic_to_shared(to + TileWords<kFeatures>::of(step) + word));
#pragma unroll
    for (int i = 0; i < kCemaTile / kSteps; ++i) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(from) : "memory");
      from += kSteps * D, target += kSteps / kBlock * TileWords<kFeatures>::kOfBlock * 4;
    }
  }
  template <int kThreads>
  __device__ void write(const std::uint32_t* from, std::int64_t tile, Bfloat16* y) const {
    constexpr int kPacks = kFeatures / 8, kSteps = kThreads / kPacks;
    static_assert(kSteps % kBlock == 0);
    const int step = static_cast<int>(threadIdx.x) / kPacks, pack = static_cast<int>(threadIdx.x) % kPacks;
    const std::uint32_t* words = from + TileWords<kFeatures>::of(step) + 4 * pack;
    Bfloat16* to = y + at(tile, step) + 8 * pack;
#pragma unroll
    for (int i = 0; i < kCemaTile / kSteps; ++i) {
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
      to += kSteps * D, words += kSteps / kBlock * TileWords<kFeatures>::kOfBlock;
    }
  }
};

// The feature of a warp in the word of two features at `word`, as a float. The other half is another warp's
// to write.
__device__ inline std::uint32_t float_bits(const std::uint32_t* word, int feature) {
  const Bfloat16 half = reinterpret_cast<const Bfloat16*>(word)[feature % 2];
  return static_cast<std::uint32_t>(half.bits) << 16;
}

// One feature of a tile as left-hand matrices: rows are blocks, columns steps, 8 at a time. Backwards both
// run from the last to the first: the same distances from the tile's last step instead of its first.
template <int kFeatures>
struct Rows {
  std::uint32_t of[4][4];

  template <bool kBack>
  __device__ void read(const std::uint32_t* tile, int feature, int lane) {
    using Words = TileWords<kFeatures>;
    constexpr int kSign = kBack ? -1 : 1;
    const int lane_words = lane / 4 * Words::kOfBlock + lane % 4 * Words::kStep;
    const std::uint32_t* const first =
        tile + feature / 2 + (kBack ? Words::of(static_cast<int>(kCemaTile) - 1) - lane_words : lane_words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int words = 8 * (i % 2) * Words::kOfBlock + (8 * k + 4 * (i / 2)) * Words::kStep;
        of[k][i] = float_bits(first + kSign * words, feature);
      }
    }
  }
};

// Columns 8 column .. + 7 of a result [blocks, steps] into its feature of the tile.
template <int kFeatures, bool kBack>
__device__ void write_columns(const float (&c)[4], int column, std::uint32_t* tile, int feature, int lane) {
  using Words = TileWords<kFeatures>;
  constexpr int kSign = kBack ? -1 : 1;
  const int lane_words = lane / 4 * Words::kOfBlock + 2 * (lane % 4) * Words::kStep;
  std::uint32_t* const first =
      tile + (kBack ? Words::of(static_cast<int>(kCemaTile) - 1) - lane_words : lane_words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int words = 8 * (i / 2) * Words::kOfBlock + (8 * column + i % 2) * Words::kStep;
    reinterpret_cast<Bfloat16*>(first + kSign * words)[feature] = from_float<Bfloat16>(c[i]);
  }
}

// A state of a feature, the same in all lanes of a column: components 4 i + lane % 4.
struct State {
  Pair of[4];

  __device__ State(int N, int lane, const float* states, std::int64_t row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 4 * i + lane % 4;
      const float* const from = states + (row * N + n) * 2;
      of[i] = states != nullptr && n < N ? Pair{from[0], from[1]} : Pair{0, 0};
    }
  }
  __device__ void write(int N, int lane, float* states, std::int64_t row) const {
    if (states == nullptr || lane >= 4) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 4 * i + lane % 4;
      float* const to = states + (row * N + n) * 2;
      if (n < N) to[0] = of[i].re, to[1] = of[i].im;
    }
  }
};

// States before each block from what each adds: s[i] is a matrix [blocks, 8 columns] as mma.sync leaves it,
// component 4 i
// + lane % 4 in (s[i][0], s[i][1]) of block lane / 4 and (s[i][2], s[i][3]) of block lane / 4 + 8. `carry`,
// the state before the first, becomes that after the last. kBack: from the last block to the first.
template <bool kBack = false>
__device__ void scan_blocks(float (&s)[4][4], const Pair (&decay)[4], State& carry, int lane) {
  const int block = kBack ? 7 - lane / 4 : lane / 4, last = (kBack ? 0 : 28) + lane % 4;
  const auto of_earlier = [](float x, int blocks) {
    return kBack ? __shfl_down_sync(~0u, x, 4 * blocks) : __shfl_up_sync(~0u, x, 4 * blocks);
  };
  const auto add_decayed = [](float& re, float& im, Pair decay_by, Pair from) {
    const Pair more = multiply(decay_by, from);
    re += more.re, im += more.im;
  };
  Pair powers[3][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    powers[0][i] = decay[i];
    powers[1][i] = multiply(decay[i], decay[i]);
    powers[2][i] = multiply(powers[1][i], powers[1][i]);
  }
  // The four components side by side: each step waits for the one before.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int half = 2 * (kBack ? 1 - h : h);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (block == 0) add_decayed(s[i][half], s[i][half + 1], decay[i], carry.of[i]);
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      Pair before[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        before[i] = {of_earlier(s[i][half], 1 << k), of_earlier(s[i][half + 1], 1 << k)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (block >= 1 << k) add_decayed(s[i][half], s[i][half + 1], powers[k][i], before[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float &re = s[i][half], &im = s[i][half + 1];
      const Pair end{__shfl_sync(~0u, re, last), __shfl_sync(~0u, im, last)};
      const Pair before{of_earlier(re, 1), of_earlier(im, 1)};
      re = block == 0 ? carry.of[i].re : before.re;
      im = block == 0 ? carry.of[i].im : before.im;
      carry.of[i] = end;
    }
  }
}

}  // namespace megalodon::ops::cuda
