#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace megalodon::generate {

struct SamplingOptions {
  double temperature = 1.0;  // 0: greedy
  int64_t top_k = 0;         // only the k likeliest; 0: all
  double top_p = 1.0;        // only the fewest likeliest that together have this probability
  uint64_t seed = 0;
};

// A token drawn from logits [V] float32; of equal logits the first wins. The draw is a function of (seed,
// position) alone, so a stream that goes on elsewhere draws the same. Non-finite logits are a work error.
int64_t sample(const at::Tensor& logits, const SamplingOptions& options, uint64_t position);

}  // namespace megalodon::generate
