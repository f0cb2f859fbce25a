#include "ops/cema/cuda.h"
#include "ops/cema/cuda_tensor_core.h"
#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"

// CEMA in blocks of kBlock steps on the tensor cores. A warp has one feature of some sequences and goes
// through their time, a tile of kBlocks blocks at a time. With X [blocks, steps] the tile's inputs, three
// products of small matrices:
//   S = X Q,            what each block adds to the state:    Q [step i, n] = p_n q_n^(kBlock - 1 - i)
//   h' = q^kBlock h + S, the states from block to block: a scan in float32
//   Y = X K + H E,      H [blocks, n] the states before each block, E [n, step j] = eta_n q_n^(j + 1),
//                       K [i, j] = k_(j - i), k_l = Re(sum_n p_n eta_n q_n^l), k_0 with omega added.
// Complex states are pairs of real columns. X is bfloat16. Q is the sum of two bfloat16 matrices, so that the
// states are as in float32; K, H and E, which only make the outputs, are rounded to bfloat16 as these are.
// Backwards in time the same gives dx from dy, with the transposed of K,
//   Q [step i, n] = conj(eta_n q_n^(i + 1)),    E [n, step j] = p_n conj(q_n)^(kBlock - 1 - j):
// the state that is carried is the gradient of h.
namespace megalodon::ops::cuda {
namespace {

constexpr int kBlocks = 32, kSteps = kBlocks * kBlock, kRun = 4;  // blocks that follow each other in a lane

struct Memory {
  // Q, 8 columns at a time: of the upper and the lower 16 steps the high, then the low part.
  uint4 q[kFeatures][8][32];
  // E, 8 steps at a time: of components 4 i + lane % 4 the real and the imaginary part.
  uint4 e[kFeatures][4][32];
  Tile<kSteps>::Rows leaving;
  Tile<kSteps>::Memory tile;
  Decays<3> decays[kFeatures];
  float kernel[kFeatures][kBlock];
  CoefficientMemory coefficients;
  Barrier arrived;
};

// The coefficients of one feature, in the direction of time that is gone through.
template <bool kBack>
struct Feature {
  const float* p;
  const Pair *q, *eta;
  float omega;

  __device__ Pair decay(int n) const { return kBack ? conjugate(q[n]) : q[n]; }
  __device__ Pair in(int n) const { return kBack ? conjugate(eta[n]) : Pair{p[n], 0}; }
  __device__ Pair out(int n) const { return kBack ? Pair{p[n], 0} : eta[n]; }
};

// What a lane keeps in registers.
struct Fragments {
  std::uint32_t k[4];  // K by its distances from the diagonal, 8 at a time
  Pair decay[4];       // q^kBlock of components 4 i + lane % 4
};

template <bool kBack>
__device__ void make_q(const Feature<kBack>& f, int lane, uint4 (&to)[8][32]) {
  const int row = lane / 4, column = lane % 4;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    // Column `row`, component 4 i + row / 2, real or imaginary, for steps 2 column, 2 column + 1 of every 8.
    const int n = 4 * i + row / 2;
    const Pair q = f.decay(n), q8 = power(q, 8);
    Pair less = multiply(f.in(n), power(q, kBack ? 2 * column + 1 : 6 - 2 * column));
    std::uint32_t high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Pair more = multiply(less, q), first = kBack ? less : more, second = kBack ? more : less;
      const int eighth = kBack ? j : 3 - j;
      split(row % 2 == 0 ? first.re : first.im, row % 2 == 0 ? second.re : second.im, high[eighth],
            low[eighth]);
      less = multiply(less, q8);
    }
    to[2 * i][lane] = {high[0], high[1], low[0], low[1]};
    to[2 * i + 1][lane] = {high[2], high[3], low[2], low[3]};
  }
}

template <bool kBack>
__device__ void make_e(const Feature<kBack>& f, int lane, uint4 (&to)[4][32]) {
  const int row = lane / 4, column = lane % 4;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int n = 4 * i + column;  // for step `row` of every 8
    const Pair q = f.decay(n), q8 = power(q, 8);
    Pair now = multiply(f.out(n), power(q, kBack ? 7 - row : row + 1));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      reinterpret_cast<std::uint32_t*>(&to[kBack ? 3 - j : j][lane])[i] = pack(now.re, -now.im);
      now = multiply(now, q8);
    }
  }
}

// k_l of lags row + 8 j, into shared memory.
template <bool kBack>
__device__ void make_kernel(const Feature<kBack>& f, int lane, float (&to)[kBlock]) {
  const int row = lane / 4, column = lane % 4;
  float sum[4] = {};
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int n = 4 * i + column;
    const Pair q = f.q[n], q8 = power(q, 8);
    Pair now = multiply(f.eta[n], power(q, row));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] += f.p[n] * now.re;
      now = multiply(now, q8);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sum[j] += __shfl_xor_sync(~0u, sum[j], 1);
    sum[j] += __shfl_xor_sync(~0u, sum[j], 2);
    if (column == 0) to[row + 8 * j] = sum[j] + (row + j == 0 ? f.omega : 0);
  }
}

template <bool kBack>
__device__ Fragments make_matrices(const Feature<kBack>& f, int warp, int lane, Memory& memory) {
  const int row = lane / 4, column = lane % 4;
  Fragments to;
  make_q(f, lane, memory.q[warp]);
  make_e(f, lane, memory.e[warp]);
  float (&kernel)[kBlock] = memory.kernel[warp];
  make_kernel(f, lane, kernel);
  if (lane < kComponents) make_decays(f.decay(lane), lane, memory.decays[warp]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Steps 2 column, 2 column + 1 in the one direction, `row` in the other.
    const int lag = 8 * i + (kBack ? 2 * column - row : row - 2 * column);
    const auto at = [&](int l) { return l >= 0 ? kernel[l] : 0; };
    to.k[i] = pack(at(lag), at(kBack ? lag + 1 : lag - 1));
    to.decay[i] = memory.decays[warp][0][4 * i + column];
  }
  return to;
}

// A feature of a tile: addresses of its rows of blocks as left-hand matrices, and what is done with them. Row
// r of the halves h of two matrices m is block 4 r + 2 m + h in the direction of time.
template <bool kBack>
struct Work {
  const Memory& memory;
  const Fragments& fragments;
  int warp, lane;
  std::uint32_t first;

  __device__ Work(const Memory& memory_in, const Fragments& fragments_in, const Tile<kSteps>& tile)
      : memory(memory_in), fragments(fragments_in), warp(tile.warp), lane(tile.lane) {
    const int row = lane % 8, half = lane / 8 % 2, eighth = lane / 16;
    first = tile.column(warp) + (kBack ? 7 - row : row) * Tile<kSteps>::kFourBlocks +
            (kBack ? 1 - half : half) * 2 * kBlock + 16 * eighth;
  }
  __device__ std::uint32_t rows(int matrix) const {
    return first + (kBack ? 1 - matrix : matrix) * 4 * kBlock;
  }

  __device__ void read(std::uint32_t (&x)[2][2][4]) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k) load_matrices<false>(x[m][k], rows(m) + 32 * k);
    }
  }
  // What each block adds to components 4 i + lane % 4.
  __device__ void add_to_states(const std::uint32_t (&x)[2][2][4], Pair (&s)[4][kRun]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint4 q = memory.q[warp][2 * i + k][lane];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(sum[m], x[m][k], q.x, q.y);
          multiply_add(sum[m], x[m][k], q.z, q.w);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
        s[i][2 * m] = {sum[m][0], sum[m][1]}, s[i][2 * m + 1] = {sum[m][2], sum[m][3]};
    }
  }
  __device__ void scan(Pair (&s)[4][kRun], Pair (&end)[4]) const {
    const auto* const of_runs =
        reinterpret_cast<const Pair(*)[kComponents]>(&memory.decays[warp][0][lane % 4]);
    scan_blocks<4, 8, false>(s, fragments.decay, of_runs, end, lane);
  }
  // y += X K for 8 steps.
  __device__ void add_lags(const std::uint32_t (&x)[2][2][4], int column, float (&y)[2][4]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int upper = kBack ? 2 * k - column : column - 2 * k, lower = kBack ? upper + 1 : upper - 1;
      if (upper < 0 && lower < 0) continue;
      const auto part = [&](int distance) { return distance < 0 ? 0 : fragments.k[distance]; };
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_add(y[m], x[m][k], part(upper), part(lower));
    }
  }
  // The outputs in the place of the inputs.
  __device__ void write_outputs(const std::uint32_t (&x)[2][2][4], const Pair (&s)[4][kRun]) const {
    std::uint32_t h[2][2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair state = s[i][2 * m + half];
          h[m][i / 2][i % 2 * 2 + half] = pack(state.re, state.im);
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // 16 steps
      float y[2][2][4] = {};
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        add_lags(x, 2 * pair + column, y[column]);
        const uint4 e = memory.e[warp][2 * pair + column][lane];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(y[column][m], h[m][0], e.x, e.y);
          multiply_add(y[column][m], h[m][1], e.z, e.w);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const std::uint32_t words[4] = {pack(y[0][m][0], y[0][m][1]), pack(y[0][m][2], y[0][m][3]),
                                        pack(y[1][m][0], y[1][m][1]), pack(y[1][m][2], y[1][m][3])};
        store_matrices<false>(words, rows(m) + 32 * pair);
      }
    }
  }
};

// The tiles of sequences first, first + apart, .. in turn, the last one of a sequence perhaps half a tile.
template <bool kBack>
struct Walk {
  int sequence, apart, halves, tile = 0;

  __device__ int first_half() const { return 2 * tile; }  // in the direction of time
  __device__ bool is_last() const { return first_half() + 2 >= halves; }
  __device__ bool is_half() const { return first_half() + 1 == halves; }
  __device__ int actual(int half) const { return kBack ? halves - 1 - half : half; }
  __device__ std::int64_t first_step() const {
    return kCemaTile * actual(first_half() + (kBack ? 1 : 0));  // may lie before the sequence
  }
  // Whether these kCemaTile steps of the tile, the first or the second, are there.
  __device__ bool has(int half) const { return !is_half() || half == (kBack ? 1 : 0); }
  __device__ void next() {
    const bool end = is_last();
    tile = end ? 0 : tile + 1;
    sequence += end ? apart : 0;
  }
};

// Outputs over `halves` times kCemaTile steps of features 16 blockIdx.x .. of sequences blockIdx.y,
// blockIdx.y + gridDim.y, .., from the carried state on. tile_state [B, halves, D, N, 2] or null.
template <bool kBack>
__global__ void __launch_bounds__(kThreads, 1)
    outputs(CemaShape s, CemaCoefficients c, const __grid_constant__ Boxes x, int halves,
            const float* carry_in, float* carry_out, float* tile_state, bool has_outputs,
            const __grid_constant__ Boxes y) {
  if constexpr (kForHopper) {
    extern __shared__ __align__(1024) uint4 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    const Tile<kSteps> tile(memory.tile);
    const int warp = tile.warp, lane = tile.lane, N = static_cast<int>(s.N);
    const int first_feature = static_cast<int>(blockIdx.x) * kFeatures;
    const std::int64_t d = first_feature + warp;
    const auto fetch = [&](const Walk<kBack>& at) {
      if (at.sequence >= s.B) return;
      memory.arrived.arrive_expecting(sizeof(memory.tile.rows));
      tile.fetch(x, first_feature, at.first_step(), at.sequence, memory.arrived);
    };
    const auto send = [&](const Walk<kBack>& at) {
      for (int i = 0; i < kSteps; i += kBoxSteps) {
        if (at.has(i / static_cast<int>(kCemaTile)))
          copy_box_back(y, first_feature, static_cast<int>(at.first_step()) + i, at.sequence,
                        shared_address(memory.leaving) + i * 32);
      }
      commit_copies_back();
    };
    Walk<kBack> now{static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y), halves}, last = now;
    if (threadIdx.x == 0) {
      memory.arrived.start(1);
      barriers_are_started();
      fetch(now);
    }
    CoefficientMemory& coefficients = memory.coefficients;
    coefficients.read(s, c, first_feature);
    const Feature<kBack> feature{coefficients.p[warp], coefficients.q[warp], coefficients.eta[warp],
                                 c.omega[d]};
    const Fragments fragments = make_matrices(feature, warp, lane, memory);
    const Work<kBack> work(memory, fragments, tile);

    Pair end[4];
    int phase = 0;
    for (; now.sequence < s.B; now.next(), ++phase) {
      const bool follows = has_outputs && phase > 0;  // the columns have the outputs of the tile `last`
      const std::int64_t row = now.sequence * s.D + d;
      if (now.tile == 0) read_state<4, 4>(end, lane % 4, N, carry_in, row);
      memory.arrived.wait(phase);
      if (threadIdx.x == 0) wait_for_copies_back();
      __syncthreads();
      if (follows) tile.to_rows(memory.leaving);
      __syncwarp();  // the columns have been read
      tile.to_columns();
      __syncthreads();
      if (threadIdx.x == 0) {
        Walk<kBack> coming = now;
        coming.next();
        fetch(coming);
        if (follows) send(last);
      }
      std::uint32_t in[2][2][4];
      work.read(in);
      Pair states[4][kRun];
      work.add_to_states(in, states);
      work.scan(states, end);
      const auto put = [&](float* state, std::int64_t of, const Pair& value, int n) {
        if (n < N) *reinterpret_cast<Pair*>(state + (of * N + n) * 2) = value;
      };
      const int half = lane / 16;
      if (tile_state != nullptr && lane / 4 % 4 == 0 && !(half == 1 && now.is_half())) {
        const std::int64_t of =
            (std::int64_t{now.sequence} * halves + now.actual(now.first_half() + half)) * s.D + d;
#pragma unroll
        for (int i = 0; i < 4; ++i) put(tile_state, of, states[i][0], 4 * i + lane % 4);
      }
      if (carry_out != nullptr && now.is_last() && lane / 4 == (now.is_half() ? 3 : 7)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) put(carry_out, row, end[i], 4 * i + lane % 4);
      }
      if (has_outputs) work.write_outputs(in, states);
      last = now;
    }
    if (!has_outputs || phase == 0) return;
    if (threadIdx.x == 0) wait_for_copies_back();
    __syncthreads();
    tile.to_rows(memory.leaving);
    __syncthreads();
    if (threadIdx.x == 0) {
      send(last);
      wait_for_copies_back();
    }
  }
}

}  // namespace

bool has_cema_blocks() {
  return has_hopper_code();
}

// As many as end soonest on a large device, where a thread block has a multiprocessor for itself and prepares
// for as long as kPrepared tiles take.
std::int64_t cema_block_groups(const CemaShape& s) {
  constexpr std::int64_t kMultiprocessors = 132, kPrepared = 4;
  const std::int64_t tiles = ceil_div(s.L, kSteps);
  std::int64_t best = 1, least = 0;
  for (std::int64_t groups = 1; groups <= s.B; ++groups) {
    const std::int64_t waves = ceil_div(s.D / kFeatures * groups, kMultiprocessors);
    const std::int64_t time = waves * (kPrepared + ceil_div(s.B, groups) * tiles);
    if (groups == 1 || time < least) best = groups, least = time;
  }
  return best;
}

void cema_blocks(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x, bool backwards,
                 const float* carry_in, float* carry_out, float* tile_state, Bfloat16* y,
                 cudaStream_t stream) {
  const auto kernel = backwards ? outputs<true> : outputs<false>;
  allow_shared_memory(kernel, sizeof(Memory));
  const dim3 grid(static_cast<unsigned>(s.D / kFeatures), static_cast<unsigned>(cema_block_groups(s)));
  kernel<<<grid, kThreads, sizeof(Memory), stream>>>(
      s, c, make_boxes(s, x), static_cast<int>(s.L / kCemaTile), carry_in, carry_out, tile_state,
      y != nullptr, make_boxes(s, y != nullptr ? y : x));
}

}  // namespace megalodon::ops::cuda
