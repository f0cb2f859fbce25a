#pragma once
#include "ops/cema/cuda_tensor_core.h"

// Gradients of CEMA's coefficients from sums over blocks. With Q = conj(q) and k_l = Re(sum_n p_n eta_n
// q_n^l) all follows from dk_l = sum_t dy_t x_(t - l). Lags within a block are summed as they are. The others
// are l = e + 1 + t, with e the distance of x from its block's end and t that of dy from the next block's
// beginning, so that with s = sum_e Q^e x_e of a block and a = sum_t Q^t dy_t of all after it
//   sum Q^(l - 1) dy x = s a,    sum l Q^(l - 1) dy x = s a + s' a + s a',
// s' and a' being sums of e Q^e x_e and t Q^t dy_t.
namespace megalodon::ops::cuda {

// Sums over the lane's blocks for its component of one half.
struct Sums {
  Pair value{0, 0}, slope{0, 0};            // s a, s' a + s a'
  Pair carried{0, 0}, carried_slope{0, 0};  // the same with the gradient of the state after all steps

  __device__ static void add_blocks(const Run& s, const Run& s_slope, const Run& a, const Run& a_slope,
                                    Pair& value, Pair& slope) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      value = multiply_add(s[k], a[k], value);
      slope = multiply_add(s_slope[k], a[k], slope);
      slope = multiply_add(s[k], a_slope[k], slope);
    }
  }
};

constexpr int kLagTiles = 4;  // of 16 x 8 lags

// Sums over the blocks of dy_j x_i, in tiles of 16 j by 8 i. The steps of x lie from the last to the first,
// so that a number's lag is j + i - 31: tiles whose lags are the same are one.
struct Lags {
  float of[kLagTiles][4] = {};

  // The lane's rows, those of x in the order of left-hand matrices: transposed it is that of right-hand ones.
  __device__ void add_blocks(std::uint32_t x_row, std::uint32_t dy_row) {
    std::uint32_t x[2][4], dy[4];
#pragma unroll
    for (int k = 0; k < 2; ++k) load_matrices<true>(x[k], x_row + 32 * k);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_matrices<true>(dy, dy_row + 32 * m);
#pragma unroll
      for (int i = 2 - 2 * m; i < 4; ++i)
        multiply_add(of[2 * m + i - 2], dy, x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    }
  }
  // dk_l, by lane. A tile's last 8 j and the next one's first 8 have the same lags: in scratch memory those
  // of row r and column i are r + i - 7, and rows past kBlock zero.
  static constexpr int kRow = 9, kZeros = 64, kScratch = kBlock * kRow + kZeros;  // numbers
  __device__ float sum(int lane, float* scratch) const {
    static_assert(8 * kLagTiles == kBlock && kZeros >= 7 * kRow);
    const int row = lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int tile = 0; tile < kLagTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scratch[(8 * tile + row) * kRow + column + i] =
            of[tile][2 + i] + (tile + 1 < kLagTiles ? of[tile + 1][i] : 0);
    }
#pragma unroll
    for (int i = 0; i < kZeros; i += 32) scratch[kBlock * kRow + i + lane] = 0;
    __syncwarp();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += scratch[(lane + 7 - i) * kRow + i];
    return sum;
  }
};

__device__ inline float sum_of_columns(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline Pair sum_of_columns(Pair x) {
  return {sum_of_columns(x.re), sum_of_columns(x.im)};
}

// What the states before sequences add to the gradients of eta and q.
struct OfFirst {
  Pair eta{0, 0}, q{0, 0};
};

// Sums over the lags within a block, with e = l - 1: what a lane adds to sum dk_l Q^l and sum l dk_l Q^e.
struct WithinBlock {
  Pair value{0, 0}, slope{0, 0};

  // lags: the right-hand matrix whose columns 0 and 1 add up to dk_e, 2 and 3 to dk_(e + 1).
  __device__ WithinBlock(const Powers& powers, const Powers& slopes, const std::uint32_t (&lags)[4],
                         int lane) {
    float of_powers[4] = {}, of_slopes[4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      multiply_add(of_powers, powers[k], lags[2 * k], lags[2 * k + 1]);
      multiply_add(of_slopes, slopes[k], lags[2 * k], lags[2 * k + 1]);
    }
    const Pair sum{of_powers[0] + of_powers[1], of_powers[2] + of_powers[3]};
    if (lane % 4 == 0) value = sum;
    if (lane % 4 == 1) slope = {sum.re + of_slopes[0] + of_slopes[1], sum.im + of_slopes[2] + of_slopes[3]};
  }
};

// The gradients of a component's coefficients from the sums.
template <bool kCarried>
__device__ inline void write_gradients(const Sums& sums, const WithinBlock& within, const OfFirst& of_first,
                                       float p, Pair q, Pair eta, int lane, int n, int N,
                                       const CemaSums& to) {
  const Pair back = conjugate(q), eta_back = conjugate(eta);
  const Pair value = sum_of_columns(multiply_add(back, sums.value, within.value));
  const Pair slope = sum_of_columns(
      Pair{within.slope.re + sums.value.re + sums.slope.re, within.slope.im + sums.value.im + sums.slope.im});
  float dp = multiply(eta_back, value).re;
  const Pair deta = multiply_add(p, value, of_first.eta);
  Pair dq = multiply_add(p, multiply(eta_back, slope), of_first.q);
  if constexpr (kCarried) {
    dp += sum_of_columns(sums.carried.re);
    dq = multiply_add(p, divide(sum_of_columns(sums.carried_slope), nonzero(back)), dq);
  }
  if (lane % 4 != 0 || n >= N) return;
  to.p[n] = dp;
  to.q[2 * n] = dq.re, to.q[2 * n + 1] = dq.im;
  to.eta[2 * n] = deta.re, to.eta[2 * n + 1] = deta.im;
}

}  // namespace megalodon::ops::cuda
