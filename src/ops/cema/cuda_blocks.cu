#include "ops/cema/cuda.h"
#include "ops/cema/cuda_tensor_core.h"
#include "ops/cuda_device.h"

// CEMA in blocks of kBlock steps on the tensor cores. A warp has one feature of one sequence and goes through its time, a
// tile of kBlocks blocks at a time. With X [blocks, steps] the tile's inputs, three products of small matrices:
//   S = X Q,            what each block adds to the state:    Q [step i, n] = p_n q_n^(kBlock - 1 - i)
//   h' = q^kBlock h + S, the states from block to block: a scan over the lanes, in float32
//   Y = X K + H E,       H [blocks, n] the states before each block, E [n, step j] = eta_n q_n^(j + 1),
//                        K [i, j] = k_(j - i), k_l = Re(sum_n p_n eta_n q_n^l), k_0 with omega added.
// Complex states are pairs of real columns. Products are tf32: X is bfloat16 and so exact, the others have 11 bits.
// Backwards in time the same gives dx from dy: with conj(q), with conj(eta) in the place of p and p in that of eta, and
// the power one more in Q and one less in E, since what is carried is conj(q) times the gradient of the state.
namespace megalodon::ops::cuda {
namespace {

constexpr int kWarps = static_cast<int>(kCemaTileFeatures);
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;  // tiles in memory: one at work, the others on their way

__device__ Pair power(Pair q, int exponent) {
  Pair result{1, 0};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = multiply(result, q);
    q = multiply(q, q);
  }
  return result;
}

// The coefficients of one feature, in the direction of time that is gone through.
struct Feature {
  const float *p, *q, *eta;  // of component 0
  float omega;
  int N;
  bool backwards;

  __device__ Pair decay(int n) const {
    return n < N ? Pair{q[2 * n], backwards ? -q[2 * n + 1] : q[2 * n + 1]} : Pair{0, 0};
  }
  __device__ Pair in(int n) const {
    if (n >= N) return {0, 0};
    return backwards ? Pair{eta[2 * n], -eta[2 * n + 1]} : Pair{p[n], 0};
  }
  __device__ Pair out(int n) const {
    if (n >= N) return {0, 0};
    return backwards ? Pair{p[n], 0} : Pair{eta[2 * n], eta[2 * n + 1]};
  }
  // k_l; 0 for l < 0.
  __device__ float kernel(int l) const {
    float sum = l == 0 ? omega : 0;
    for (int n = 0; n < N && l >= 0; ++n) sum += multiply(multiply(in(n), out(n)), power(decay(n), l)).re;
    return sum;
  }
};

// Fragments of the right-hand matrices that a lane holds, as mma.sync wants them.
struct Matrices {
  float q[4][4][2];  // Q: 8 steps x 8 columns at a time
  float k[4][2];     // K: by the distance of the 8 steps to the 8 steps
  Pair decay[4];     // q^kBlock of the lane's components 4 i + lane % 4

  __device__ Matrices(const Feature& f, int lane, float* kernel, float4* e) {
    const int row = lane / 4, column = lane % 4;
    for (int l = lane; l < kBlock; l += 32) kernel[l] = f.kernel(l);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Column `row` of Q's columns 8 i ..: component 4 i + row / 2, real or imaginary.
      const int n = 4 * i + row / 2;
      const Pair q_n = f.decay(n), q4 = power(q_n, 4);
      Pair now = multiply(f.in(n), power(q_n, 3 - column + (f.backwards ? 1 : 0)));  // step kBlock - 4 + column
#pragma unroll
      for (int s = 7; s >= 0; --s) {
        q[s / 2][i][s % 2] = to_tf32(row % 2 == 0 ? now.re : now.im);
        now = multiply(now, q4);
      }
      // Rows of E: component 4 i + column, for steps row + 8 j.
      const int m = 4 * i + column;
      const Pair q_m = f.decay(m), q8 = power(q_m, 8);
      Pair there = multiply(f.out(m), power(q_m, row + (f.backwards ? 0 : 1)));
      float e_re[4], e_im[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        e_re[j] = to_tf32(there.re), e_im[j] = to_tf32(-there.im);
        there = multiply(there, q8);
      }
      e[(2 * i) * 32 + lane] = {e_re[0], e_im[0], e_re[1], e_im[1]};
      e[(2 * i + 1) * 32 + lane] = {e_re[2], e_im[2], e_re[3], e_im[3]};
      decay[i] = power_in_double(q_m, kBlock);
      const int near = row - column + 8 * i;
      k[i][0] = near >= 0 ? to_tf32(kernel[near]) : 0;
      k[i][1] = near >= 4 ? to_tf32(kernel[near - 4]) : 0;
    }
  }
};

// Outputs of the whole tiles of features blockIdx.x * kWarps .. of sequence blockIdx.y, from the carried state on.
// tile_state [B, tiles, D, N, 2] or null: what is carried into each tile.
__global__ void __launch_bounds__(kThreads, 1)
    outputs(CemaShape s, CemaCoefficients c, const Bfloat16* x, std::int64_t tiles, bool backwards, const float* carry_in,
            float* carry_out, float* tile_state, Bfloat16* y) {
  extern __shared__ float4 shared[];
  auto* const buffers = reinterpret_cast<std::uint32_t*>(shared + kWarps * 8 * 32);  // a tile each
  float4* const e = shared + static_cast<int>(threadIdx.x) / 32 * 8 * 32;
  __shared__ float kernels[kWarps][kBlock];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t b = blockIdx.y, first_feature = std::int64_t{blockIdx.x} * kWarps, d = first_feature + warp;
  const int N = static_cast<int>(s.N);
  const Feature feature{c.p + d * N, c.q + 2 * d * N, c.eta + 2 * d * N, c.omega[d], N, backwards};
  const Matrices m(feature, lane, kernels[warp], e);
  using Words = TileWords<kWarps>;
  const TileMemory<kWarps> memory{s.L, s.D, b, first_feature};
  const auto actual = [&](std::int64_t i) { return backwards ? tiles - 1 - i : i; };

  State carry(N, lane, carry_in, b * s.D + d);
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles) memory.fetch(x, actual(i), buffers + i * Words::kAll);
    commit_copies();
  }
  for (std::int64_t i = 0; i < tiles; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this tile is there, and the last one's buffer has been written out
    if (i + kStages - 1 < tiles)
      memory.fetch(x, actual(i + kStages - 1), buffers + (i + kStages - 1) % kStages * Words::kAll);
    commit_copies();
    auto* const tile = buffers + i % kStages * Words::kAll;
    if (tile_state != nullptr) carry.write(N, lane, tile_state, (b * tiles + actual(i)) * s.D + d);
    Rows<kWarps> in;
    in.read(tile, warp, lane, backwards);
    float states[4][4] = {};
#pragma unroll
    for (int column = 0; column < 4; ++column) {
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_add(states[column], in.of[k], m.q[k][column]);
    }
    scan_blocks(states, m.decay, carry, lane);
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      float out[4] = {};
#pragma unroll
      for (int k = 0; k <= column; ++k) multiply_add(out, in.of[k], m.k[column - k]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float4 pair = e[(2 * k + column / 2) * 32 + lane];
        const float right[2] = {column % 2 == 0 ? pair.x : pair.z, column % 2 == 0 ? pair.y : pair.w};
        // Columns of the states in the order real, imaginary: rows column, column + 4 of E.
        const std::uint32_t left[4] = {tf32_bits(states[k][0]), tf32_bits(states[k][2]), tf32_bits(states[k][1]),
                                       tf32_bits(states[k][3])};
        multiply_add(out, left, right);
      }
      write_columns<kWarps>(out, column, tile, warp, lane, backwards);
    }
    __syncthreads();
    if (y != nullptr) memory.write(tile, actual(i), y);
  }
  carry.write(N, lane, carry_out, b * s.D + d);
}

}  // namespace

void cema_blocks(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x, bool backwards, const float* carry_in,
                 float* carry_out, float* tile_state, Bfloat16* y, cudaStream_t stream) {
  const std::size_t shared = kWarps * 8 * 32 * sizeof(float4) + kStages * TileWords<kWarps>::kAll * sizeof(std::uint32_t);
  allow_shared_memory(outputs, shared);
  const dim3 grid(static_cast<unsigned>(s.D / kWarps), static_cast<unsigned>(s.B));
  outputs<<<grid, kThreads, shared, stream>>>(s, c, x, s.L / kCemaTile, backwards, carry_in, carry_out, tile_state, y);
}

}  // namespace megalodon::ops::cuda
