// Matrix products on blocks that stay in cache. Included once for each SIMD target, like ops/simd-inl.h.
//
// The inner dimension is counted in units of 32 bits: a float32, or a pair of neighbouring bfloat16. With A
// rows of units and B [units, columns], float32 and bfloat16 then share all loops; only the product of two
// units differs.
#if defined(MEGALODON_OPS_ATTENTION_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MEGALODON_OPS_ATTENTION_PRODUCT_INL_H_
#undef MEGALODON_OPS_ATTENTION_PRODUCT_INL_H_
#else
#define MEGALODON_OPS_ATTENTION_PRODUCT_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "ops/bfloat16.h"
#include "ops/philox-inl.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {

using Unit = std::uint32_t;

// What is multiplied: the element type, how many of it are in a unit, and sum + a b over a unit.
struct FloatUnits {
  using Element = float;
  static constexpr std::int64_t kElements = 1;
  static HWY_INLINE FloatVec multiply_add(WordVec a, WordVec b, FloatVec sum) {
    return hn::MulAdd(hn::BitCast(kFloat, a), hn::BitCast(kFloat, b), sum);
  }
};

struct Bfloat16Units {
  using Element = Bfloat16;
  static constexpr std::int64_t kElements = 2;
  static HWY_INLINE FloatVec multiply_add(WordVec a, WordVec b, FloatVec sum) {
    const auto high = hn::Set(kWord, 0xFFFF0000u);
    const auto first = [](WordVec x) HWY_ATTR { return hn::BitCast(kFloat, hn::ShiftLeft<16>(x)); };
    const auto second = [&](WordVec x) HWY_ATTR { return hn::BitCast(kFloat, hn::And(x, high)); };
    return hn::MulAdd(second(a), second(b), hn::MulAdd(first(a), first(b), sum));
  }
};

// The same by the processor's own instruction (AVX512_BF16), which is none of Highway's AVX-512 target.
struct NativeBfloat16Units {
  using Element = Bfloat16;
  static constexpr std::int64_t kElements = 2;
  static HWY_INLINE FloatVec multiply_add(WordVec a, WordVec b, FloatVec sum) {
#if HWY_TARGET == HWY_AVX3
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
    return sum;
#else
    return Bfloat16Units::multiply_add(a, b, sum);
#endif
  }
};

template <class U>
constexpr std::int64_t units(std::int64_t elements) {
  return (elements + U::kElements - 1) / U::kElements;
}
// Row length in memory of n floats or units: whole vectors of any target, and no multiple of 4 KiB, at which
// rows would share the sets of a cache.
constexpr std::int64_t padded(std::int64_t n) {
  const std::int64_t whole = (n + 15) / 16 * 16;
  return whole % 64 == 0 ? whole + 16 : whole;
}

// A tile of C in registers: 32 vector registers of AVX-512 hold 6 x 4 sums, 16 of others 6 x 2.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = HWY_TARGET == HWY_AVX3 ? 4 : 2;

struct Left {  // element (i, u) at data[i row + u step]
  const Unit* data;
  std::int64_t row, step;
};

// The loops over the sums are unrolled so that these stay in registers.
template <class U, int rows, int vectors>
void multiply_tile(Left a, const Unit* HWY_RESTRICT b, std::int64_t b_row, std::int64_t depth,
                   float* HWY_RESTRICT c, std::int64_t c_row, bool accumulate) {
  FloatVec sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j)
      sums[i][j] = accumulate ? load(c + i * c_row + j * kLanes) : hn::Zero(kFloat);
  }
  for (std::int64_t u = 0; u < depth; ++u) {
    WordVec right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = hn::LoadU(kWord, b + u * b_row + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto left = hn::Set(kWord, a.data[i * a.row + u * a.step]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sums[i][j] = U::multiply_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) store(sums[i][j], c + i * c_row + j * kLanes);
  }
}

template <class U, int vectors, int rows = kTileRows>
HWY_INLINE void multiply_rows(std::int64_t count, Left a, const Unit* b, std::int64_t b_row,
                              std::int64_t depth, float* c, std::int64_t c_row, bool accumulate) {
  if (count == rows) return multiply_tile<U, rows, vectors>(a, b, b_row, depth, c, c_row, accumulate);
  if constexpr (rows > 1)
    multiply_rows<U, vectors, rows - 1>(count, a, b, b_row, depth, c, c_row, accumulate);
}

// What of C's rows is wanted: columns 0 .. columns-1, from the units begin .. end-1 of the inner dimension.
struct Extent {
  std::int64_t columns, begin, end;
};

// C [M, columns] = A B, or C += A B. `extent(first, last)` of neighbouring rows of C says what is worth
// computing; whole vectors are written. B and C have rows of at least that length.
template <class U, class F>
void multiply(std::int64_t M, std::int64_t columns, Left a, const Unit* b, std::int64_t b_row, float* c,
              std::int64_t c_row, bool accumulate, F&& extent) {
  constexpr std::int64_t kWide = kTileVectors * kLanes;
  for (std::int64_t j = 0; j < columns;) {
    const bool wide = columns - j > kWide - kLanes;  // whole vectors are written
    for (std::int64_t i = 0; i < M; i += kTileRows) {
      const std::int64_t count = std::min<std::int64_t>(kTileRows, M - i);
      const Extent e = extent(i, i + count - 1);
      if (j >= e.columns) continue;
      const Left left{a.data + i * a.row + e.begin * a.step, a.row, a.step};
      const Unit* const right = b + e.begin * b_row + j;
      const std::int64_t depth = std::max<std::int64_t>(0, e.end - e.begin);
      float* const out = c + i * c_row + j;
      if (wide) {
        multiply_rows<U, kTileVectors>(count, left, right, b_row, depth, out, c_row, accumulate);
      } else {
        multiply_rows<U, 1>(count, left, right, b_row, depth, out, c_row, accumulate);
      }
    }
    j += wide ? kWide : kLanes;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#endif
