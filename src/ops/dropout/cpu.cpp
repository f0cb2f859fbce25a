#include "ops/dropout/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/dropout/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>

#include "base/parallel.h"
#include "ops/philox-inl.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

// The random words of the counters block .. block + kLanes - 1, one after the other.
HWY_INLINE void philox_words(std::uint64_t key, std::uint64_t block, std::uint32_t* HWY_RESTRICT words) {
  const auto first = hn::Set(kWord, static_cast<std::uint32_t>(block));
  const auto low = hn::Add(first, hn::Iota(kWord, 0));
  const auto carry = hn::IfThenElseZero(hn::Lt(low, first), hn::Set(kWord, 1));
  const auto high = hn::Add(hn::Set(kWord, static_cast<std::uint32_t>(block >> 32)), carry);
  const auto c = philox_vectors(key, {low, high, hn::Zero(kWord), hn::Zero(kWord)});
  hn::StoreInterleaved4(c.c0, c.c1, c.c2, c.c3, kWord, words);
}

// begin is a multiple of 4.
template <class T>
void drop(const T* HWY_RESTRICT x, std::uint64_t key, std::uint32_t threshold, float scale,
          std::int64_t begin, std::int64_t end, T* HWY_RESTRICT y) {
  const auto least = hn::Set(kWord, threshold);
  const auto factor = hn::Set(kFloat, scale);
  std::uint32_t words[4 * kLanes];
  for (std::int64_t i = begin; i < end; i += 4 * kLanes) {
    philox_words(key, static_cast<std::uint64_t>(i / 4), words);
    for_vectors(std::min(4 * kLanes, end - i), [&](std::int64_t j, auto part) HWY_ATTR {
      const auto dropped = hn::RebindMask(kFloat, hn::Gt(least, hn::LoadU(kWord, words + j)));
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
