#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

// Over n elements; b and db may be null together: y = silu(a) then. T is float or Bfloat16. The backward pass
// writes y, the forward result, again, unless it is null.
template <class T>
void swiglu_forward(const T* a, const T* b, T* y, std::int64_t n);
template <class T>
void swiglu_backward(const T* a, const T* b, const T* dy, T* da, T* db, T* y, std::int64_t n);

}  // namespace megalodon::ops::cpu
