// Vectors of float32 over float32 or bfloat16 memory. Included once for each SIMD target, after
// hwy/foreach_target.h, by kernel files alone (ops/swiglu/cpu.cpp is the pattern).
#if defined(MEGALODON_OPS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MEGALODON_OPS_SIMD_INL_H_
#undef MEGALODON_OPS_SIMD_INL_H_
#else
#define MEGALODON_OPS_SIMD_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cstdint>

#include "ops/bfloat16.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
inline constexpr FloatTag kFloat{};
inline constexpr std::int64_t kLanes = hn::MaxLanes(kFloat);  // float32 lanes of a vector: 4, 8 or 16

HWY_INLINE FloatVec load(const float* p) {
  return hn::LoadU(kFloat, p);
}
HWY_INLINE FloatVec load(const Bfloat16* p) {
  const hn::Rebind<std::uint16_t, FloatTag> d16;
  const hn::Rebind<std::uint32_t, FloatTag> d32;
  const auto wide = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p)));
  return hn::BitCast(kFloat, hn::ShiftLeft<16>(wide));
}

HWY_INLINE void store(FloatVec v, float* p) {
  hn::StoreU(v, kFloat, p);
}
HWY_INLINE void store(FloatVec v, Bfloat16* p) {  // to the nearest, ties to even; NaN stays NaN
  const hn::Rebind<std::uint16_t, FloatTag> d16;
  const hn::Rebind<std::uint32_t, FloatTag> d32;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(d32, 0x7FFF)), odd);
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, hn::Set(d32, 0x7FC00000), rounded));
  hn::StoreU(hn::TruncateTo(d16, high), d16, reinterpret_cast<std::uint16_t*>(p));
}

// The first n < kLanes elements; the other lanes are 0 (load) or untouched in memory (store).
template <class T>
HWY_INLINE FloatVec load_some(const T* p, std::int64_t n) {
  T buffer[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
HWY_INLINE void store_some(FloatVec v, T* p, std::int64_t n) {
  T buffer[kLanes];
  store(v, buffer);
  for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

HWY_INLINE FloatVec sigmoid(FloatVec a) {
  const auto one = hn::Set(kFloat, 1.0f);
  return hn::Div(one, hn::Add(one, hn::Exp(kFloat, hn::Neg(a))));
}

}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#endif
