#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

// logits, d_logits [T, V] of E (float or Bfloat16); targets [T], in 0..V-1, or `ignored`; nll, d_nll [T].
template <class E>
void cross_entropy_forward(const E* logits, const std::int64_t* targets, std::int64_t ignored, std::int64_t T,
                           std::int64_t V, float* nll);
template <class E>
void cross_entropy_backward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                            const float* nll, const float* d_nll, std::int64_t T, std::int64_t V,
                            E* d_logits);

}  // namespace megalodon::ops::cpu
