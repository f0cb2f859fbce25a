// Philox4x32-10 (base/random.h) of a vector of counters. Included once for each SIMD target, like
// ops/simd-inl.h.
#if defined(MEGALODON_OPS_PHILOX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MEGALODON_OPS_PHILOX_INL_H_
#undef MEGALODON_OPS_PHILOX_INL_H_
#else
#define MEGALODON_OPS_PHILOX_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {

using WordTag = hn::Rebind<std::uint32_t, FloatTag>;
using WordVec = hn::Vec<WordTag>;
inline constexpr WordTag kWord{};

// The low and high words of the products of 32-bit words.
struct WordProduct {
  WordVec low, high;
};
HWY_INLINE WordProduct multiply_words(WordVec a, std::uint32_t factor) {
#if HWY_TARGET == HWY_SCALAR  // what g++ takes for the baseline
  const std::uint64_t product = std::uint64_t{hn::GetLane(a)} * factor;
  return {hn::Set(kWord, static_cast<std::uint32_t>(product)),
          hn::Set(kWord, static_cast<std::uint32_t>(product >> 32))};
#else
  const hn::Repartition<std::uint64_t, WordTag> d64;
  const auto factors = hn::Set(kWord, factor);
  const auto even = hn::MulEven(a, factors);
  const auto odd = hn::MulEven(hn::BitCast(kWord, hn::ShiftRight<32>(hn::BitCast(d64, a))), factors);
  return {hn::OddEven(hn::BitCast(kWord, hn::ShiftLeft<32>(odd)), hn::BitCast(kWord, even)),
          hn::OddEven(hn::BitCast(kWord, odd), hn::BitCast(kWord, hn::ShiftRight<32>(even)))};
#endif
}

// Counters in, their random words out.
struct PhiloxVecs {
  WordVec c0, c1, c2, c3;
};
HWY_INLINE PhiloxVecs philox_vectors(std::uint64_t key, PhiloxVecs c) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const auto a = multiply_words(c.c0, 0xD2511F53u), b = multiply_words(c.c2, 0xCD9E8D57u);
    c.c0 = hn::Xor(hn::Xor(b.high, c.c1), hn::Set(kWord, k0));
    c.c1 = b.low;
    c.c2 = hn::Xor(hn::Xor(a.high, c.c3), hn::Set(kWord, k1));
    c.c3 = a.low;
  }
  return c;
}

}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#endif
