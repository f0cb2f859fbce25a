#pragma once
#include <ATen/ATen.h>

#include <bit>

namespace megalodon::bench {

// CEMA as a causal convolution with k_j = Re(sum_n p eta q^j) by an FFT of twice the length rounded up to a
// power of two: the form of the authors' code, written with torch operations. Arguments as ops::cema, whose y
// it returns.
inline at::Tensor cema_fft(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                           const at::Tensor& eta, const at::Tensor& omega) {
  const auto L = x.size(1);
  const auto powers = at::exp(at::log(q).unsqueeze(-1) * at::arange(L, p.options()));   // [D, N, L]
  const auto kernel = at::real(at::matmul((p * eta).unsqueeze(1), powers).squeeze(1));  // [D, L]
  const auto length = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(2 * L)));
  const auto spectrum = at::fft_rfft(x.transpose(1, 2), length) * at::fft_rfft(kernel, length);  // [B, D, F]
  return at::fft_irfft(spectrum, length).narrow(-1, 0, L).transpose(1, 2) + omega * x;
}

}  // namespace megalodon::bench
