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
#include <cstring>
#include <type_traits>

#include "ops/bfloat16.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
inline constexpr FloatTag kFloat{};
inline constexpr std::int64_t kLanes = hn::MaxLanes(kFloat);  // float32 lanes of a vector: 4, 8 or 16

// bfloat16 bits to float32, and back to the nearest, ties to even; NaN stays NaN.
using Bfloat16Vec = hn::Vec<hn::Rebind<std::uint16_t, FloatTag>>;
HWY_INLINE FloatVec widen(Bfloat16Vec bits) {
  const hn::Rebind<std::uint32_t, FloatTag> d32;
  return hn::BitCast(kFloat, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}
HWY_INLINE Bfloat16Vec narrow(FloatVec v) {
  const hn::Rebind<std::uint16_t, FloatTag> d16;
  const hn::Rebind<std::uint32_t, FloatTag> d32;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(d32, 0x7FFF)), odd);
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
  return hn::TruncateTo(d16, hn::ShiftRight<16>(hn::IfThenElse(is_nan, hn::Set(d32, 0x7FC00000), rounded)));
}

HWY_INLINE FloatVec load(const float* p) {
  return hn::LoadU(kFloat, p);
}
HWY_INLINE FloatVec load(const Bfloat16* p) {
  return widen(hn::LoadU(hn::Rebind<std::uint16_t, FloatTag>(), reinterpret_cast<const std::uint16_t*>(p)));
}
HWY_INLINE void store(FloatVec v, float* p) {
  hn::StoreU(v, kFloat, p);
}
HWY_INLINE void store(Bfloat16Vec bits, Bfloat16* p) {
  hn::StoreU(bits, hn::Rebind<std::uint16_t, FloatTag>(), reinterpret_cast<std::uint16_t*>(p));
}
HWY_INLINE void store(FloatVec v, Bfloat16* p) {
  store(narrow(v), p);
}

// The first n < kLanes elements; the other lanes are 0 (load) or untouched in memory (store). Nothing beyond
// n is read: by masked memory access where the target has it.
#if HWY_TARGET == HWY_AVX3
template <class T>
inline constexpr bool kMaskedAccess = true;
#else
template <class T>
inline constexpr bool kMaskedAccess = HWY_TARGET == HWY_AVX2 && std::is_same_v<T, float>;
#endif
template <class T>
HWY_INLINE void copy_some(const T* from, std::int64_t n, T* to) {
  for (std::int64_t size = kLanes / 2; size > 0; size /= 2) {
    if ((n & size) == 0) continue;
    std::memcpy(to, from, static_cast<std::size_t>(size) * sizeof(T));
    from += size;
    to += size;
  }
}
template <class T>
HWY_INLINE FloatVec load_some(const T* p, std::int64_t n) {
  if constexpr (!kMaskedAccess<T>) {
    T buffer[kLanes] = {};
    copy_some(p, n, buffer);
    return load(buffer);
  } else if constexpr (std::is_same_v<T, float>) {
    return hn::MaskedLoad(hn::FirstN(kFloat, static_cast<std::size_t>(n)), kFloat, p);
  } else {
    const hn::Rebind<std::uint16_t, FloatTag> d16;
    return widen(hn::MaskedLoad(hn::FirstN(d16, static_cast<std::size_t>(n)), d16,
                                reinterpret_cast<const std::uint16_t*>(p)));
  }
}
template <class T>
HWY_INLINE void store_some(FloatVec v, T* p, std::int64_t n) {
  if constexpr (!kMaskedAccess<T>) {
    T buffer[kLanes];
    store(v, buffer);
    copy_some(buffer, n, p);
  } else if constexpr (std::is_same_v<T, float>) {
    hn::BlendedStore(v, hn::FirstN(kFloat, static_cast<std::size_t>(n)), kFloat, p);
  } else {
    const hn::Rebind<std::uint16_t, FloatTag> d16;
    hn::BlendedStore(narrow(v), hn::FirstN(d16, static_cast<std::size_t>(n)), d16,
                     reinterpret_cast<std::uint16_t*>(p));
  }
}

// The vectors of a row: whole ones, and the first n < kLanes elements of the last.
struct Whole {};
struct Some {
  std::int64_t n;
};
template <class T>
HWY_INLINE FloatVec load(const T* p, Whole) {
  return load(p);
}
template <class T>
HWY_INLINE FloatVec load(const T* p, Some part) {
  return load_some(p, part.n);
}
template <class T>
HWY_INLINE void store(FloatVec v, T* p, Whole) {
  store(v, p);
}
template <class T>
HWY_INLINE void store(FloatVec v, T* p, Some part) {
  store_some(v, p, part.n);
}
// v with 0 in the lanes outside the part.
HWY_INLINE FloatVec within(FloatVec v, Whole) {
  return v;
}
HWY_INLINE FloatVec within(FloatVec v, Some part) {
  return hn::IfThenElseZero(hn::FirstN(kFloat, static_cast<std::size_t>(part.n)), v);
}
// Calls f(i, part) for each vector of 0 .. n-1, in order, i its first element.
template <class F>
HWY_INLINE void for_vectors(std::int64_t n, F&& f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, Whole{});
  if (i < n) f(i, Some{n - i});
}

// The vector x(i) with the neighbours of each pair exchanged.
template <class F>
HWY_INLINE FloatVec exchanged(F&& x, std::int64_t i) {
#if HWY_TARGET == HWY_SCALAR  // one lane: what g++ takes for the baseline
  return x(i ^ 1);
#else
  return hn::Shuffle2301(x(i));
#endif
}

HWY_INLINE float sum_of_lanes(FloatVec v) {
  return hn::GetLane(hn::SumOfLanes(kFloat, v));
}

HWY_INLINE FloatVec sigmoid(FloatVec a) {
  const auto one = hn::Set(kFloat, 1.0f), most = hn::Set(kFloat, 88.0f);  // beyond, Exp is of no use
  return hn::Div(one, hn::Add(one, hn::Exp(kFloat, hn::Min(hn::Neg(a), most))));
}

}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#endif
