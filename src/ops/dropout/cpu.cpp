#include "ops/dropout/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/dropout/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>

#include "base/parallel.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

using WordTag = hn::Rebind<std::uint32_t, FloatTag>;
using WordVec = hn::Vec<WordTag>;

// The low and high words of the products of 32-bit words.
struct Product {
  WordVec low, high;
};
HWY_INLINE Product multiply(WordVec a, std::uint32_t factor) {
  const WordTag d;
  const hn::Repartition<std::uint64_t, WordTag> d64;
  const auto factors = hn::Set(d, factor);
  const auto even = hn::MulEven(a, factors);
  const auto odd = hn::MulEven(hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(d64, a))), factors);
  return {hn::OddEven(hn::BitCast(d, hn::ShiftLeft<32>(odd)), hn::BitCast(d, even)),
          hn::OddEven(hn::BitCast(d, odd), hn::BitCast(d, hn::ShiftRight<32>(even)))};
}

// Philox4x32-10 (base/random.h) of the counters block .. block + kLanes - 1: their words one after the other.
HWY_INLINE void philox_words(std::uint64_t key, std::uint64_t block, std::uint32_t* HWY_RESTRICT words) {
  const WordTag d;
  const auto first = hn::Set(d, static_cast<std::uint32_t>(block));
  auto c0 = hn::Add(first, hn::Iota(d, 0));
  const auto carry = hn::IfThenElseZero(hn::Lt(c0, first), hn::Set(d, 1));
  auto c1 = hn::Add(hn::Set(d, static_cast<std::uint32_t>(block >> 32)), carry);
  auto c2 = hn::Zero(d), c3 = hn::Zero(d);
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const auto a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
    c0 = hn::Xor(hn::Xor(b.high, c1), hn::Set(d, k0));
    c1 = b.low;
    c2 = hn::Xor(hn::Xor(a.high, c3), hn::Set(d, k1));
    c3 = a.low;
  }
  hn::StoreInterleaved4(c0, c1, c2, c3, d, words);
}

// begin is a multiple of 4.
template <class T>
void drop(const T* HWY_RESTRICT x, std::uint64_t key, std::uint32_t threshold, float scale,
          std::int64_t begin, std::int64_t end, T* HWY_RESTRICT y) {
  const WordTag d;
  const auto least = hn::Set(d, threshold);
  const auto factor = hn::Set(kFloat, scale);
  std::uint32_t words[4 * kLanes];
  for (std::int64_t i = begin; i < end; i += 4 * kLanes) {
    philox_words(key, static_cast<std::uint64_t>(i / 4), words);
    for_vectors(std::min(4 * kLanes, end - i), [&](std::int64_t j, auto part) HWY_ATTR {
      const auto dropped = hn::RebindMask(kFloat, hn::Gt(least, hn::LoadU(d, words + j)));
      store(hn::IfThenZeroElse(dropped, hn::Mul(load(x + i + j, part), factor)), y + i + j, part);
    });
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

template <class T>
void dropout(const T* x, std::uint64_t key, std::uint32_t threshold, float scale, std::int64_t n, T* y) {
  const auto kernel = MEGALODON_DISPATCH(drop<T>);
  constexpr std::int64_t kPiece = 1024;
  parallel_for((n + kPiece - 1) / kPiece, 16, [&](std::int64_t begin, std::int64_t end) {
    kernel(x, key, threshold, scale, begin * kPiece, std::min(n, end * kPiece), y);
  });
}

template void dropout(const float*, std::uint64_t, std::uint32_t, float, std::int64_t, float*);
template void dropout(const Bfloat16*, std::uint64_t, std::uint32_t, float, std::int64_t, Bfloat16*);

}  // namespace megalodon::ops::cpu
#endif
