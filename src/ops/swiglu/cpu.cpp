#include "ops/swiglu/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/swiglu/cpu.cpp"
#include <hwy/foreach_target.h>

#include "base/parallel.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

// silu(a) b for one vector; b null: silu(a).
template <class T>
HWY_INLINE FloatVec forward_one(FloatVec a, const FloatVec* b) {
  const auto silu = hn::Mul(a, sigmoid(a));
  return b != nullptr ? hn::Mul(silu, *b) : silu;
}

template <class T>
void forward(const T* HWY_RESTRICT a, const T* HWY_RESTRICT b, T* HWY_RESTRICT y, std::int64_t begin,
             std::int64_t end) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const FloatVec gate = b != nullptr ? load(b + i) : hn::Zero(kFloat);
    store(forward_one<T>(load(a + i), b != nullptr ? &gate : nullptr), y + i);
  }
  if (i < end) {
    const FloatVec gate = b != nullptr ? load_some(b + i, end - i) : hn::Zero(kFloat);
    store_some(forward_one<T>(load_some(a + i, end - i), b != nullptr ? &gate : nullptr), y + i, end - i);
  }
}

// d silu(a)/da = s (1 + a (1 - s)) with s = sigmoid(a).
struct Gradients {
  FloatVec da, db, y;
};
HWY_INLINE Gradients backward_one(FloatVec a, FloatVec b, FloatVec dy) {
  const auto one = hn::Set(kFloat, 1.0f);
  const auto s = sigmoid(a);
  const auto slope = hn::Mul(s, hn::MulAdd(a, hn::Sub(one, s), one));
  const auto silu = hn::Mul(a, s);
  return {hn::Mul(dy, hn::Mul(b, slope)), hn::Mul(dy, silu), hn::Mul(silu, b)};
}

template <class T>
void backward(const T* HWY_RESTRICT a, const T* HWY_RESTRICT b, const T* HWY_RESTRICT dy, T* HWY_RESTRICT da,
              T* HWY_RESTRICT db, T* HWY_RESTRICT y, std::int64_t begin, std::int64_t end) {
  const auto one = hn::Set(kFloat, 1.0f);
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const auto g = backward_one(load(a + i), b != nullptr ? load(b + i) : one, load(dy + i));
    store(g.da, da + i);
    if (b != nullptr) store(g.db, db + i);
    if (y != nullptr) store(g.y, y + i);
  }
  if (i < end) {
    const std::int64_t n = end - i;
    const auto g =
        backward_one(load_some(a + i, n), b != nullptr ? load_some(b + i, n) : one, load_some(dy + i, n));
    store_some(g.da, da + i, n);
    if (b != nullptr) store_some(g.db, db + i, n);
    if (y != nullptr) store_some(g.y, y + i, n);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {
namespace {
constexpr std::int64_t kGrain = 1 << 14;
}

template <class T>
void swiglu_forward(const T* a, const T* b, T* y, std::int64_t n) {
  const auto kernel = MEGALODON_DISPATCH(forward<T>);
  parallel_for(n, kGrain, [&](std::int64_t begin, std::int64_t end) { kernel(a, b, y, begin, end); });
}

template <class T>
void swiglu_backward(const T* a, const T* b, const T* dy, T* da, T* db, T* y, std::int64_t n) {
  const auto kernel = MEGALODON_DISPATCH(backward<T>);
  parallel_for(n, kGrain,
               [&](std::int64_t begin, std::int64_t end) { kernel(a, b, dy, da, db, y, begin, end); });
}

template void swiglu_forward(const float*, const float*, float*, std::int64_t);
template void swiglu_forward(const Bfloat16*, const Bfloat16*, Bfloat16*, std::int64_t);
template void swiglu_backward(const float*, const float*, const float*, float*, float*, float*, std::int64_t);
template void swiglu_backward(const Bfloat16*, const Bfloat16*, const Bfloat16*, Bfloat16*, Bfloat16*,
                              Bfloat16*, std::int64_t);

}  // namespace megalodon::ops::cpu
#endif
