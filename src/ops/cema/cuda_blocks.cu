#include "ops/cema/cuda.h"
#include "ops/cema/cuda_tensor_core.h"
#include "ops/cuda_device.h"

// CEMA in blocks of kBlock steps on the tensor cores. A warp has one feature of one sequence and goes through
// its time, a tile of kBlocks blocks at a time. With X [blocks, steps] the tile's inputs, three products of
// small matrices:
//   S = X Q,            what each block adds to the state:    Q [step i, n] = p_n q_n^(kBlock - 1 - i)
//   h' = q^kBlock h + S, the states from block to block: a scan over the lanes, in float32
//   Y = X K + H E,       H [blocks, n] the states before each block, E [n, step j] = eta_n q_n^(j + 1),
//                        K [i, j] = k_(j - i), k_l = Re(sum_n p_n eta_n q_n^l), k_0 with omega added.
// Complex states are pairs of real columns. Products are tf32: X is bfloat16 and so exact, the others have 11
// bits. Backwards in time the same gives dx from dy: with conj(q), with conj(eta) in the place of p and p in
// that of eta, and the power one more in Q and one less in E, since what is carried is conj(q) times the
// gradient of the state.
namespace megalodon::ops::cuda {
namespace {

constexpr int kWarps = 8;  // of a block, two of which run side by side: one computes while the other waits
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;  // tiles in memory: one at work, the others on their way

// The coefficients of one feature, in the direction of time that is gone through.
template <bool kBack>
struct Feature {
  const float* p;
  const Pair *q, *eta;
  float omega;

  __device__ Pair decay(int n) const { return {q[n].re, kBack ? -q[n].im : q[n].im}; }
  __device__ Pair in(int n) const { return kBack ? Pair{eta[n].re, -eta[n].im} : Pair{p[n], 0}; }
  __device__ Pair out(int n) const { return kBack ? Pair{p[n], 0} : eta[n]; }
  __device__ float kernel(int l) const {  // k_l
    float sum = l == 0 ? omega : 0;
#pragma unroll 4
    for (int n = 0; n < kMostBlockComponents; ++n) sum += p[n] * multiply(eta[n], power(q[n], l)).re;
    return sum;
  }
};

// Fragments of the right-hand matrices that a lane holds, as mma.sync wants them.
struct Matrices {
  float2 q[4][4];  // Q: 8 steps x 8 columns at a time
  float2 k[4];     // K: by the distance of the 8 steps to the 8 steps
  Pair decay[4];   // q^kBlock of the lane's components 4 i + lane % 4

  template <bool kBack>
  __device__ Matrices(const Feature<kBack>& f, int lane, float* kernel, float4* e) {
    const int row = lane / 4, column = lane % 4;
    for (int l = lane; l < kBlock; l += 32) kernel[l] = f.kernel(l);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Column `row` of Q's columns 8 i ..: component 4 i + row / 2, real or imaginary.
      const int n = 4 * i + row / 2;
      const Pair q_n = f.decay(n), q4 = power(q_n, 4);
      Pair now = multiply(f.in(n), power(q_n, 3 - column + (kBack ? 1 : 0)));  // step kBlock - 4 + column
#pragma unroll
      for (int s = 7; s >= 0; --s) {
        (s % 2 == 0 ? q[s / 2][i].x : q[s / 2][i].y) = to_tf32(row % 2 == 0 ? now.re : now.im);
        now = multiply(now, q4);
      }
      // Rows of E: component 4 i + column, for steps row + 8 j.
      const int m = 4 * i + column;
      const Pair q_m = f.decay(m), q8 = power(q_m, 8);
      Pair there = multiply(f.out(m), power(q_m, row + (kBack ? 0 : 1)));
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
      k[i] = {near >= 0 ? to_tf32(kernel[near]) : 0, near >= 4 ? to_tf32(kernel[near - 4]) : 0};
    }
  }
};

// Outputs of the whole tiles of features blockIdx.x * kWarps .. of sequence blockIdx.y, from the carried
// state on. tile_state [B, tiles, D, N, 2] or null: what is carried into each tile.
template <bool kBack>
__global__ void __launch_bounds__(kThreads, 2)
    outputs(CemaShape s, CemaCoefficients c, const Bfloat16* x, std::int64_t tiles, const float* carry_in,
            float* carry_out, float* tile_state, Bfloat16* y) {
  extern __shared__ float4 shared[];
  auto* const buffers = reinterpret_cast<std::uint32_t*>(shared + kWarps * 8 * 32);  // a tile each
  float4* const e = shared + static_cast<int>(threadIdx.x) / 32 * 8 * 32;
  __shared__ float kernels[kWarps][kBlock];
  __shared__ CoefficientMemory<kWarps> coefficients;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t b = blockIdx.y, first_feature = std::int64_t{blockIdx.x} * kWarps,
                     d = first_feature + warp;
  const int N = static_cast<int>(s.N);
  coefficients.read(s, c, first_feature);
  const Feature<kBack> feature{coefficients.p[warp], coefficients.q[warp], coefficients.eta[warp],
                               c.omega[d]};
  const Matrices m(feature, lane, kernels[warp], e);
  using Words = TileWords<kWarps>;
  const TileMemory<kWarps> memory{s.L, s.D, b, first_feature};
  const auto actual = [&](std::int64_t i) { return kBack ? tiles - 1 - i : i; };

  State carry(N, lane, carry_in, b * s.D + d);
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles) memory.template fetch<kThreads>(x, actual(i), buffers + i * Words::kAll);
    commit_copies();
  }
  for (std::int64_t i = 0; i < tiles; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this tile is there, and the last one's buffer has been written out
    if (i + kStages - 1 < tiles)
      memory.template fetch<kThreads>(x, actual(i + kStages - 1),
                                      buffers + (i + kStages - 1) % kStages * Words::kAll);
    commit_copies();
    auto* const tile = buffers + i % kStages * Words::kAll;
    if (tile_state != nullptr) carry.write(N, lane, tile_state, (b * tiles + actual(i)) * s.D + d);
    Rows<kWarps> in;
    in.template read<kBack>(tile, warp, lane);
    float states[4][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int column = 0; column < 4; ++column) multiply_add(states[column], in.of[k], m.q[k][column]);
    }
    scan_blocks<false>(states, m.decay, carry, lane);
    __syncwarp();  // all lanes have read the feature that the results replace
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // two columns side by side
      float out[2][4] = {};
#pragma unroll
      for (int k = 0; k <= 2 * pair + 1; ++k) {
        if (k <= 2 * pair) multiply_add(out[0], in.of[k], m.k[2 * pair - k]);
        multiply_add(out[1], in.of[k], m.k[2 * pair + 1 - k]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Columns of the states in the order real, imaginary: rows i, i + 4 of E.
        const std::uint32_t left[4] = {tf32_bits(states[k][0]), tf32_bits(states[k][2]),
                                       tf32_bits(states[k][1]), tf32_bits(states[k][3])};
        const float4 right = e[(2 * k + pair) * 32 + lane];
        multiply_add(out[0], left, {right.x, right.y});
        multiply_add(out[1], left, {right.z, right.w});
      }
      write_columns<kWarps, kBack>(out[0], 2 * pair, tile, warp, lane);
      write_columns<kWarps, kBack>(out[1], 2 * pair + 1, tile, warp, lane);
    }
    __syncthreads();
    if (y != nullptr) memory.template write<kThreads>(tile, actual(i), y);
  }
  carry.write(N, lane, carry_out, b * s.D + d);
}

}  // namespace

void cema_blocks(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x, bool backwards,
                 const float* carry_in, float* carry_out, float* tile_state, Bfloat16* y,
                 cudaStream_t stream) {
  const std::size_t shared =
      kWarps * 8 * 32 * sizeof(float4) + kStages * TileWords<kWarps>::kAll * sizeof(std::uint32_t);
  const auto kernel = backwards ? outputs<true> : outputs<false>;
  allow_shared_memory(kernel, shared);
  const dim3 grid(static_cast<unsigned>(s.D / kWarps), static_cast<unsigned>(s.B));
  kernel<<<grid, kThreads, shared, stream>>>(s, c, x, s.L / kCemaTile, carry_in, carry_out, tile_state, y);
}

}  // namespace megalodon::ops::cuda
