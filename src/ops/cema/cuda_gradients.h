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
        const int j = lane + 15 - 8 * tile - i;
        if (j >= 0 && j < 16) sum += scratch[(tile * 16 + j) * 8 + i];
      }
    }
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

// The gradients of a component's coefficients from the sums, with those over lags within a block, sum_l dk_l
// Q^l and its derivative; each lane of a row has every fourth lag.
template <bool kCarried>
__device__ inline void write_gradients(const Sums& sums, const OfFirst& of_first, float p, Pair q, Pair eta,
                                       const float (&lags)[kBlock], int lane, int n, int N,
                                       const CemaSums& to) {
  const int column = lane % 4;
  const Pair back = conjugate(q), eta_back = conjugate(eta), one{1, 0};
  const Pair back2 = multiply(back, back), back3 = multiply(back2, back), back4 = multiply(back2, back2);
  Pair value{0, 0}, slope{0, 0};  // of a polynomial in back4
#pragma unroll
  for (int i = kBlock / 4 - 1; i >= 0; --i) {
    slope = multiply_add(slope, back4, value);
    value = multiply_add(value, back4, {lags[4 * i + column], 0});
  }
  const Pair before = column == 3 ? back2 : column == 2 ? back : one;  // the power of one lag less
  const Pair first = column == 0 ? one : multiply(before, back);
  slope = multiply(first, multiply({4 * back3.re, 4 * back3.im}, slope));
  slope = multiply_add(static_cast<float>(column), multiply(before, value), slope);
  value = multiply(first, value);
  value = sum_of_columns(multiply_add(back, sums.value, value));
  slope = sum_of_columns(
      Pair{slope.re + sums.value.re + sums.slope.re, slope.im + sums.value.im + sums.slope.im});
  float dp = multiply(eta_back, value).re;
  const Pair deta = multiply_add(p, value, of_first.eta);
  Pair dq = multiply_add(p, multiply(eta_back, slope), of_first.q);
  if constexpr (kCarried) {
    dp += sum_of_columns(sums.carried.re);
    dq = multiply_add(p, divide(sum_of_columns(sums.carried_slope), nonzero(back)), dq);
  }
  if (column != 0 || n >= N) return;
  to.p[n] = dp;
  to.q[2 * n] = dq.re, to.q[2 * n + 1] = dq.im;
  to.eta[2 * n] = deta.re, to.eta[2 * n + 1] = deta.im;
}

}  // namespace megalodon::ops::cuda
