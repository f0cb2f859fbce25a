#include "ops/cema/cuda.h"
#include "ops/cema/cuda_tensor_core.h"
#include "ops/cuda_device.h"

// Gradients of CEMA's coefficients in blocks on the tensor cores (cuda_blocks.cu has the notation). Over all
// blocks r of a feature, with h the state before a block, g the gradient of that after it, and step i, j
// within it:
//   U [i, n] = sum_r g x_i,    V [j, n] = sum_r dy_j h,    W [j, i] = sum_r dy_j x_i,    A [n] = sum_r g
//   conj(h).
// They are the gradients of p q^(kBlock - 1 - i), of conj(eta q^(j + 1)), of k_(j - i) and of q^kBlock, and
// those of p, q, eta and omega follow at the end. The blocks' states come from a scan forwards, their
// gradients from one backwards from what was carried into the tile.
namespace megalodon::ops::cuda {
namespace {

constexpr int kFeatures = 8;  // a warp each
constexpr int kThreads = 32 * kFeatures;
constexpr int kStages = 3;
constexpr int kScratchRow =
    40;  // floats from block to block of a matrix [blocks, 32 columns] in scratch memory
using Words = TileWords<kFeatures>;

struct Coefficients {  // of one feature
  const float* p;
  const Pair *q, *eta;
};

// Right-hand matrices [steps, columns] that a lane finds in table[(k 4 + column) 32 + lane], 8 x 8 at a time:
// what the inputs add to the state after the block, or, `backwards`, the gradients of the outputs to that of
// the state before it.
__device__ void make_table(const Coefficients& c, bool backwards, int lane, float2* table) {
  const bool real = lane / 4 % 2 == 0;
  const int i = lane % 4;
#pragma unroll
  for (int column = 0; column < 4; ++column) {
    const int n = 4 * column + lane / 8;
    const Pair q = c.q[n], q4 = power(q, 4);
    // Steps i, i + 4, ..: of the powers step + 1, or from the last step on of kBlock - 1 - step.
    Pair now = backwards ? multiply(c.eta[n], power(q, i + 1)) : multiply({c.p[n], 0}, power(q, 3 - i));
    float value[8];
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      value[s] = to_tf32(real ? now.re : backwards ? -now.im : now.im);
      now = multiply(now, q4);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      table[(k * 4 + column) * 32 + lane] =
          backwards ? float2{value[2 * k], value[2 * k + 1]} : float2{value[7 - 2 * k], value[6 - 2 * k]};
    }
  }
}

// One feature of a tile as a left-hand matrix [steps, blocks], 16 x 8 at a time: of[m][k] for steps 16 m ..
// and blocks 8 k ..
struct Columns {
  std::uint32_t of[2][2][4];

  __device__ void read(const std::uint32_t* tile, int feature, int lane) {
    const std::uint32_t* const first =
        tile + feature / 2 + lane % 4 * Words::kOfBlock + lane / 4 * Words::kStep;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int words = (8 * k + 4 * (i / 2)) * Words::kOfBlock + (16 * m + 8 * (i % 2)) * Words::kStep;
          of[m][k][i] = float_bits(first + words, feature);
        }
      }
    }
  }
};

// sum [m][column] += left [steps, blocks] times states [blocks, columns], which go through scratch memory of
// the warp.
__device__ void add_products(const float (&states)[4][4], const Columns& left, int lane, float* scratch,
                             float (&sum)[2][4][4]) {
  __syncwarp();
#pragma unroll
  for (int column = 0; column < 4; ++column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = scratch + (lane / 4 + 8 * half) * kScratchRow + 8 * column + 2 * (lane % 4);
      *reinterpret_cast<float2*>(to) = {to_tf32(states[column][2 * half]),
                                        to_tf32(states[column][2 * half + 1])};
    }
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      const float* const from = scratch + (8 * k + lane % 4) * kScratchRow + 8 * column + lane / 4;
      const float2 right{from[0], from[4 * kScratchRow]};
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_add(sum[m][column], left.of[m][k], right);
    }
  }
}

struct Sums {
  float u[2][4][4] = {}, v[2][4][4] = {}, w[2][4][4] = {};  // steps 16 m .., columns 8 i ..
  Pair a[4] = {};  // of this lane's blocks, components 4 i + lane % 4

  __device__ void add_lags(const Columns& x, const Columns& dy) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const auto& there = x.of[column / 2][k];
        const float2 right{__uint_as_float(there[column % 2]), __uint_as_float(there[2 + column % 2])};
        if (column < 2) multiply_add(w[0][column], dy.of[0][k], right);
        multiply_add(w[1][column], dy.of[1][k], right);
      }
    }
  }
  __device__ void add_decay(const float (&h)[4][4], const float (&g)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const Pair more = multiply({g[i][half], g[i][half + 1]}, {h[i][half], -h[i][half + 1]});
        a[i].re += more.re, a[i].im += more.im;
      }
    }
  }
  // The gradients of k_l, by lane: the sums along the diagonals of w.
  __device__ float lags(int lane, float* scratch) const {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int column = 0; column < 4; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = 16 * m + lane / 4 + 8 * (i / 2);
          scratch[step * 33 + 8 * column + 2 * (lane % 4) + i % 2] = w[m][column][i];
        }
      }
    }
    __syncwarp();
    float sum = 0;
    for (int step = lane; step < kBlock; ++step) sum += scratch[step * 33 + step - lane];
    return sum;
  }
};

__device__ void add(Pair& sum, Pair a, Pair b) {  // a conj(b)
  sum.re += a.re * b.re + a.im * b.im, sum.im += a.im * b.re - a.re * b.im;
}
__device__ float sum_of_rows(float x) {  // over the lanes of a column
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The gradients of the coefficients of components 4 i + lane % 4 from the sums; each lane has some steps.
__device__ void write_gradients(const Sums& s, const Coefficients& c, int N, int lane, float* scratch,
                                std::int64_t rows, std::int64_t D, float* to) {
  const float lag = s.lags(lane, scratch);
  if (lane == 0) to[std::int64_t{5} * N * rows * D] = lag;  // of omega
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int n = 4 * i + lane % 4;
    const float p = c.p[n];
    const Pair q = c.q[n], eta = c.eta[n];
    float dp = 0;
    Pair dq{0, 0}, deta{0, 0};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int step = lane / 4 + 8 * m, left = kBlock - 1 - step;
      const int half = 2 * (m % 2);
      const Pair u{s.u[m / 2][i][half], s.u[m / 2][i][half + 1]};
      const Pair v{s.v[m / 2][i][half], -s.v[m / 2][i][half + 1]};
      const Pair q_left = power(q, left), q_step = power(q, step), q_next = multiply(q_step, q);
      const float dk = __shfl_sync(~0u, lag, step);
      // p q^left
      dp += u.re * q_left.re + u.im * q_left.im;
      if (left > 0) {
        const Pair slope = power(q, left - 1);
        add(dq, u, {p * left * slope.re, p * left * slope.im});
      }
      // eta q^(step + 1)
      add(deta, v, q_next);
      const Pair slope = multiply(eta, q_step);
      add(dq, v, {(step + 1) * slope.re, (step + 1) * slope.im});
      // k_step = Re(p eta q^step)
      const Pair k = multiply(eta, q_step);
      dp += dk * k.re;
      add(deta, {dk * p, 0}, q_step);
      if (step > 0) {
        const Pair k_slope = multiply(eta, power(q, step - 1));
        add(dq, {dk * p * step, 0}, k_slope);
      }
    }
    const Pair slope = power(q, kBlock - 1);
    add(dq, s.a[i], {kBlock * slope.re, kBlock * slope.im});
    dp = sum_of_rows(dp);
    dq = {sum_of_rows(dq.re), sum_of_rows(dq.im)};
    deta = {sum_of_rows(deta.re), sum_of_rows(deta.im)};
    if (lane >= 4 || n >= N) continue;
    const auto put = [&](std::int64_t what, float value) { to[what * rows * D] = value; };
    put(n, dp);
    put(N + 2 * n, dq.re), put(N + 2 * n + 1, dq.im);
    put(3 * N + 2 * n, deta.re), put(3 * N + 2 * n + 1, deta.im);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    gradients(CemaShape shape, CemaCoefficients c, const Bfloat16* x, const Bfloat16* dy, std::int64_t tiles,
              const float* tile_gradient, std::int64_t rows, float* to) {
  extern __shared__ float2
      tables[];  // [features, 2, 16, 32], scratch [features, 16, kScratchRow], tiles of x and dy
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float2* const forward = tables + warp * 2 * 16 * 32;
  float2* const backward = forward + 16 * 32;
  auto* const all_scratch = reinterpret_cast<float*>(tables + kFeatures * 2 * 16 * 32);
  constexpr int kScratch = 33 * kBlock;  // at least kBlocks rows of states, or a matrix of lags
  float* const scratch = all_scratch + warp * kScratch;
  auto* const buffers = reinterpret_cast<std::uint32_t*>(all_scratch + kFeatures * kScratch);
  const std::int64_t b = blockIdx.y, first_feature = std::int64_t{blockIdx.x} * kFeatures,
                     d = first_feature + warp;
  const int N = static_cast<int>(shape.N);
  __shared__ CoefficientMemory<kFeatures> coefficients;
  coefficients.read(shape, c, first_feature);
  const Coefficients own{coefficients.p[warp], coefficients.q[warp], coefficients.eta[warp]};
  make_table(own, false, lane, forward);
  make_table(own, true, lane, backward);
  Pair decay[4], decay_back[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    decay[i] = power_in_double(own.q[4 * i + lane % 4], kBlock);
    decay_back[i] = {decay[i].re, -decay[i].im};
  }
  const TileMemory<kFeatures> memory{shape.L, shape.D, b, first_feature};
  const auto fetch = [&](std::int64_t tile) {
    if (tile < tiles) {
      std::uint32_t* const buffer = buffers + tile % kStages * 2 * Words::kAll;
      memory.template fetch<kThreads>(x, tile, buffer);
      memory.template fetch<kThreads>(dy, tile, buffer + Words::kAll);
    }
    commit_copies();
  };

  State carry(N, lane, c.h0, b * shape.D + d);
  Sums sums;
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    const std::uint32_t* const x_tile = buffers + tile % kStages * 2 * Words::kAll;
    const std::uint32_t* const dy_tile = x_tile + Words::kAll;
    const auto products_with = [&](const std::uint32_t* from, const float2* table, float (&states)[4][4]) {
      Rows<kFeatures> in;
      in.template read<false>(from, warp, lane);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          multiply_add(states[column], in.of[k], table[(k * 4 + column) * 32 + lane]);
        }
      }
    };
    float h[4][4] = {}, g[4][4] = {};
    products_with(x_tile, forward, h);
    products_with(dy_tile, backward, g);
    scan_blocks(h, decay, carry, lane);
    State after(N, lane, tile_gradient, (b * tiles + tile) * shape.D + d);
    scan_blocks<true>(g, decay_back, after, lane);
    sums.add_decay(h, g);
    Columns x_columns, dy_columns;
    x_columns.read(x_tile, warp, lane);
    dy_columns.read(dy_tile, warp, lane);
    sums.add_lags(x_columns, dy_columns);
    add_products(g, x_columns, lane, scratch, sums.u);
    add_products(h, dy_columns, lane, scratch, sums.v);
  }
  write_gradients(sums, own, N, lane, scratch, rows, shape.D, to + b * shape.D + d);
}

}  // namespace

void cema_blocks_gradients(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x,
                           const Bfloat16* dy, const float* tile_gradient, std::int64_t rows, float* sums,
                           cudaStream_t stream) {
  const std::size_t shared = kFeatures * (2 * 16 * 32 * sizeof(float2) + 33 * kBlock * sizeof(float)) +
                             kStages * 2 * Words::kAll * sizeof(std::uint32_t);
  allow_shared_memory(gradients, shared);
  const dim3 grid(static_cast<unsigned>(s.D / kFeatures), static_cast<unsigned>(s.B));
  gradients<<<grid, kThreads, shared, stream>>>(s, c, x, dy, s.L / kCemaTile, tile_gradient, rows, sums);
}

}  // namespace megalodon::ops::cuda
