#include "ops/cema/cuda.h"
#include "ops/cema/cuda_tensor_core.h"
#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"

// Gradients of CEMA's coefficients in blocks on the tensor cores. Of a block of kBlock steps, with h the
// state before it and g the gradient of that after it,
//   h' = q^kBlock h + s,              s = sum_i p q^(kBlock - 1 - i) x_i,
//   y_j = Re(eta q^(j + 1) h) + ..,   g' = conj(q)^kBlock g + r,    r = sum_j conj(eta q^(j + 1)) dy_j,
// so that, with s' and r' the derivatives of the sums' coefficients by q and conj(q), the block adds
//   Re(g conj(s)) / p to dp,    conj(h) r / conj(eta) to deta,
//   kBlock conj(q^(kBlock - 1)) g conj(h) + g conj(s') + conj(h) r' to dq,
// and through k_l = Re(sum_n p_n eta_n q_n^l) what follows from dk_l = sum_j dy_j x_(j - l). s, s', r and r'
// are products of small matrices, dk_l the diagonals of one over the blocks; h and g come from scans forwards
// and, from what was carried into the tile, backwards. Products are bfloat16: what rounding the powers of q
// adds is of the size of what rounded x and dy.
namespace megalodon::ops::cuda {
namespace {

constexpr int kSteps = static_cast<int>(kCemaTile), kRun = 4;  // blocks that follow each other in a lane
constexpr int kHalf = kComponents / 2;  // a lane has components lane / 4 of both halves
constexpr int kLagTiles = 4;            // of 16 x 8 lags

// Transposed matrices [8 components, steps], the real parts above the imaginary, of the upper and the lower
// 16 steps.
using Table = uint4[2][32];
struct Tables {
  Table value, slope;
};

struct Memory {
  Tables of_x[kFeatures][2], of_dy[kFeatures][2];  // by half
  Tile<kSteps>::Memory x, dy;
  Decays<2> decays[kFeatures];
  CoefficientMemory coefficients;
  float lags[kFeatures][kBlock];
  Barrier arrived;

  // In the place of the warp's tables, when they have been used.
  __device__ float* scratch(int warp) {
    static_assert(kLagTiles * 16 * 8 * sizeof(float) <= sizeof(of_x[0]));
    return reinterpret_cast<float*>(of_x[warp]);
  }
};

// What is divided by in the end. Beside numbers of any use its least value is nothing.
__device__ float nonzero(float x) {
  return fabsf(x) < 1e-30F ? 1e-30F : x;
}
__device__ Pair nonzero(Pair x) {
  return fabsf(x.re) < 1e-30F && fabsf(x.im) < 1e-30F ? Pair{1e-30F, 0} : x;
}

// Coefficients in q^e and in e q^(e - 1) for component lane / 4 and steps 2 (lane % 4), the next, and those
// 8, 16 and 24 later: e = kBlock - 1 - step, or, kBack, step + 1.
template <bool kBack>
__device__ void make_tables(Pair in, Pair q, int lane, Tables& to) {
  const int column = lane % 4, least = kBack ? 2 * column + 1 : 6 - 2 * column;
  const Pair q7 = power(q, 7), q8 = multiply(q7, q);
  Pair before = least == 0 ? Pair{0, 0} : multiply(in, power(q, least - 1));
  Pair less = multiply(in, power(q, least));
  std::uint32_t value[2][4], slope[2][4];  // real, imaginary; by 8 steps
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto e = static_cast<float>(least + 8 * j);
    const Pair more = multiply(less, q);
    const Pair less_slope{e * before.re, e * before.im}, more_slope{(e + 1) * less.re, (e + 1) * less.im};
    const auto put = [eighth = kBack ? j : 3 - j](std::uint32_t (&at)[2][4], Pair a, Pair b) {
      at[0][eighth] = kBack ? pack(a.re, b.re) : pack(b.re, a.re);
      at[1][eighth] = kBack ? pack(a.im, b.im) : pack(b.im, a.im);
    };
    put(value, less, more);
    put(slope, less_slope, more_slope);
    before = multiply(less, q7), less = multiply(less, q8);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    to.value[k][lane] = {value[0][2 * k], value[1][2 * k], value[0][2 * k + 1], value[1][2 * k + 1]};
    to.slope[k][lane] = {slope[0][2 * k], slope[1][2 * k], slope[0][2 * k + 1], slope[1][2 * k + 1]};
  }
}

// Matrices of 8 blocks x 8 steps of a feature: those of steps 8 i .. and, in rows 2 c and 2 c + 1, blocks 4 c
// + 2 t and the next. Lane 8 j + r has row r of the one that is wanted j-th.
__device__ std::uint32_t row_of_blocks(std::uint32_t column, int lane, int t, int i) {
  const int row = lane % 8;
  return column + (row / 2) * Tile<kSteps>::kFourBlocks + (2 * t + row % 2) * 2 * kBlock + i * 16;
}
// words[t][i]
__device__ void read_blocks(std::uint32_t column, int lane, std::uint32_t (&words)[2][4]) {
  const std::uint32_t from = row_of_blocks(column, lane, 0, lane / 8);
#pragma unroll
  for (int t = 0; t < 2; ++t) load_matrices<false>(words[t], from + t * 4 * kBlock);
}

// table [8 components, steps] times the steps of the lane's run of blocks.
__device__ void multiply_table(const Table& table, const std::uint32_t (&blocks)[2][4], int lane,
                               Pair (&to)[1][kRun]) {
  float sum[2][4] = {};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint4 a = table[k][lane];
    const std::uint32_t left[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int t = 0; t < 2; ++t) multiply_add(sum[t], left, blocks[t][2 * k], blocks[t][2 * k + 1]);
  }
#pragma unroll
  for (int t = 0; t < 2; ++t)
    to[0][2 * t] = {sum[t][0], sum[t][2]}, to[0][2 * t + 1] = {sum[t][1], sum[t][3]};
}

__device__ void add(Pair& sum, Pair a, Pair b) {  // conj(a) b
  sum.re = sum.re + a.re * b.re + a.im * b.im, sum.im = sum.im + a.re * b.im - a.im * b.re;
}
__device__ float sum_of_columns(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

using Run = Pair[1][kRun];  // of a component

// Sums over the lane's blocks for its component of one half.
struct Sums {
  float p = 0;                           // Re(g conj(s))
  Pair q{0, 0}, eta{0, 0}, decay{0, 0};  // g conj(s') + conj(h) r', conj(h) r, conj(h) g

  __device__ void add_blocks(const Run& s, const Run& r, const Run& h, const Run& g) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      p = p + g[0][k].re * s[0][k].re + g[0][k].im * s[0][k].im;
      add(eta, h[0][k], r[0][k]);
      add(decay, h[0][k], g[0][k]);
    }
  }
  __device__ void add_slopes(const Run& slope_conjugate, const Run& slope) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) add(q, slope_conjugate[0][k], slope[0][k]);
  }
};

// Sums over the blocks of dy_j x_i, in tiles of 16 j by 8 i whose first lag j - i is first_lag(tile).
struct Lags {
  float of[kLagTiles][4] = {};

  __device__ static int first_lag(int tile) { return 8 * tile - 8; }

  __device__ void add_blocks(std::uint32_t x_column, std::uint32_t dy_column, int lane) {
    const int j = lane / 8;
    const std::uint32_t x_row = row_of_blocks(x_column, lane, j % 2, j / 2);
    const std::uint32_t dy_row = row_of_blocks(dy_column, lane, j / 2, j % 2);
    std::uint32_t x[2][4], dy[4];  // [.][2 i + t], [2 t + i]
#pragma unroll
    for (int k = 0; k < 2; ++k) load_matrices<true>(x[k], x_row + 32 * k);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_matrices<true>(dy, dy_row + 32 * m);
#pragma unroll
      for (int i = 0; i < 2 * m + 2; ++i)
        multiply_add(of[2 * m - i + 1], dy, x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    }
  }
  // dk_l, by lane; scratch of kLagTiles 16 x 8 numbers.
  __device__ float sum(int lane, float* scratch) const {
#pragma unroll
    for (int tile = 0; tile < kLagTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scratch[(tile * 16 + lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = of[tile][i];
    }
    __syncwarp();
    float sum = 0;
    for (int tile = 0; tile < kLagTiles; ++tile) {
      for (int i = 0; i < 8; ++i) {
        const int j = lane - first_lag(tile) + i;
        if (j >= 0 && j < 16) sum += scratch[(tile * 16 + j) * 8 + i];
      }
    }
    return sum;
  }
};

// The gradients of a component's coefficients from the sums; each lane of a row has every fourth lag.
__device__ void write_gradients(const Sums& sums, float p, Pair q, Pair eta, const float (&lags)[kBlock],
                                int lane, int n, int N, const CemaSums& to) {
  const int column = lane % 4;
  float dp = sums.p / nonzero(p);
  const Pair divisor = nonzero(eta), last = power(q, kBlock - 1);
  const float size = hypotf(divisor.re, divisor.im);
  Pair deta = multiply({sums.eta.re / size, sums.eta.im / size}, {divisor.re / size, divisor.im / size});
  Pair dq = sums.q;
  add(dq, {kBlock * last.re, kBlock * last.im}, sums.decay);
  const Pair q4 = power(q, 4);
  Pair before = column == 0 ? Pair{0, 0} : power(q, column - 1), now = power(q, column);
#pragma unroll 1
  for (int i = 0; i < kBlock / 4; ++i) {
    const int lag = 4 * i + column;
    const float dk = lags[lag];
    dp += dk * multiply(eta, now).re;
    add(deta, now, {dk * p, 0});
    add(dq, multiply(eta, before), {static_cast<float>(lag) * dk * p, 0});
    before = column == 0 ? multiply(power(q, 3), now) : multiply(before, q4);
    now = multiply(now, q4);
  }
  dp = sum_of_columns(dp);
  dq = {sum_of_columns(dq.re), sum_of_columns(dq.im)};
  deta = {sum_of_columns(deta.re), sum_of_columns(deta.im)};
  if (column != 0 || n >= N) return;
  to.p[n] = dp;
  to.q[2 * n] = dq.re, to.q[2 * n + 1] = dq.im;
  to.eta[2 * n] = deta.re, to.eta[2 * n + 1] = deta.im;
}

// Of features 16 blockIdx.x .., over sequences blockIdx.y, blockIdx.y + gridDim.y, ..
__global__ void __launch_bounds__(kThreads, 1)
    gradients(CemaShape shape, CemaCoefficients c, const __grid_constant__ Boxes x,
              const __grid_constant__ Boxes dy, std::int64_t tiles, const float* tile_gradient, CemaSums to) {
  if constexpr (kForHopper) {
    extern __shared__ __align__(1024) uint4 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    const Tile<kSteps> x_tile(memory.x), dy_tile(memory.dy);
    const int warp = x_tile.warp, lane = x_tile.lane, N = static_cast<int>(shape.N);
    const std::int64_t first_feature = std::int64_t{blockIdx.x} * kFeatures, d = first_feature + warp;
    const auto fetch = [&](std::int64_t sequence, std::int64_t tile) {
      if (threadIdx.x != 0 || sequence >= shape.B) return;
      memory.arrived.arrive_expecting(sizeof(memory.x.rows) + sizeof(memory.dy.rows));
      x_tile.fetch(x, first_feature, tile * kCemaTile, sequence, memory.arrived);
      dy_tile.fetch(dy, first_feature, tile * kCemaTile, sequence, memory.arrived);
    };
    if (threadIdx.x == 0) {
      memory.arrived.start(1);
      barriers_are_started();
    }
    fetch(blockIdx.y, 0);
    CoefficientMemory& own = memory.coefficients;
    own.read(shape, c, first_feature);
    if (lane < kComponents) make_decays(own.q[warp][lane], lane, memory.decays[warp]);
#pragma unroll 1
    for (int m = 0; m < 2; ++m) {
      const int n = kHalf * m + lane / 4;
      const Pair q = own.q[warp][n];
      make_tables<false>({nonzero(own.p[warp][n]), 0}, q, lane, memory.of_x[warp][m]);
      make_tables<true>(conjugate(nonzero(own.eta[warp][n])), conjugate(q), lane, memory.of_dy[warp][m]);
    }
    __syncwarp();
    const Pair decay[2] = {memory.decays[warp][0][lane / 4], memory.decays[warp][0][kHalf + lane / 4]};

    Sums sums[2];
    Lags lags;
    int phase = 0;
    for (std::int64_t sequence = blockIdx.y; sequence < shape.B; sequence += gridDim.y) {
      Pair end[2];
      read_state<2, kHalf>(end, lane / 4, N, c.h0, sequence * shape.D + d);
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        Pair after[2];
        read_state<2, kHalf>(after, lane / 4, N, tile_gradient, (sequence * tiles + tile) * shape.D + d);
        memory.arrived.wait(phase++);
        __syncthreads();  // no warp reads the last tile's columns any more
        x_tile.to_columns();
        dy_tile.to_columns();
        __syncthreads();
        if (tile + 1 < tiles) {
          fetch(sequence, tile + 1);
        } else {
          fetch(sequence + gridDim.y, 0);
        }
        lags.add_blocks(x_tile.column(warp), dy_tile.column(warp), lane);
        std::uint32_t x_blocks[2][4], dy_blocks[2][4];
        read_blocks(x_tile.column(warp), lane, x_blocks);
        read_blocks(dy_tile.column(warp), lane, dy_blocks);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Run s, r, h, g;
          multiply_table(memory.of_x[warp][m].value, x_blocks, lane, s);
          multiply_table(memory.of_dy[warp][m].value, dy_blocks, lane, r);
#pragma unroll
          for (int k = 0; k < kRun; ++k) h[0][k] = s[0][k], g[0][k] = r[0][k];
          const auto scan = [&]<bool kBack>(Run& state, Pair& from) {
            const auto* const of_runs =
                reinterpret_cast<const Pair(*)[kComponents]>(&memory.decays[warp][0][kHalf * m + lane / 4]);
            const Pair of_block[1] = {decay[m]};
            Pair last[1] = {from};
            scan_blocks<1, 4, kBack>(state, of_block, of_runs, last, lane);
            from = last[0];
          };
          scan.template operator()<false>(h, end[m]);
          scan.template operator()<true>(g, after[m]);
          sums[m].add_blocks(s, r, h, g);
          multiply_table(memory.of_x[warp][m].slope, x_blocks, lane, s);
          sums[m].add_slopes(s, g);
          multiply_table(memory.of_dy[warp][m].slope, dy_blocks, lane, r);
          sums[m].add_slopes(h, r);
        }
      }
    }
    __syncwarp();  // the tables have been used
    memory.lags[warp][lane] = lags.sum(lane, memory.scratch(warp));
    __syncwarp();
    const std::int64_t row = blockIdx.y * to.apart;
    to.p += row + d * N, to.q += row + 2 * d * N, to.eta += row + 2 * d * N;
    if (lane == 0) to.omega[row + d] = memory.lags[warp][0];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int n = kHalf * m + lane / 4;
      write_gradients(sums[m], own.p[warp][n], own.q[warp][n], own.eta[warp][n], memory.lags[warp], lane, n,
                      N, to);
    }
  }
}

}  // namespace

void cema_blocks_gradients(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x,
                           const Bfloat16* dy, const float* tile_gradient, const CemaSums& sums,
                           cudaStream_t stream) {
  allow_shared_memory(gradients, sizeof(Memory));
  const dim3 grid(static_cast<unsigned>(s.D / kFeatures), static_cast<unsigned>(cema_block_groups(s)));
  gradients<<<grid, kThreads, sizeof(Memory), stream>>>(s, c, make_boxes(s, x), make_boxes(s, dy),
                                                        s.L / kCemaTile, tile_gradient, sums);
}

}  // namespace megalodon::ops::cuda
