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
#include <type_traits>

#include "ops/bfloat16.h"
#include "ops/philox-inl.h"
#include "ops/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {

using Unit = std::uint32_t;

// Rows of a tile, and units of its inner dimension. Operands reach to whole tiles in memory: what is beyond
// their ends is zero along the inner dimension, anything in rows and columns.
inline constexpr std::int64_t kTile = 16;
constexpr std::int64_t whole_tiles(std::int64_t n) {
  return (n + kTile - 1) / kTile * kTile;
}

// What is multiplied: the element type, how many of it are in a unit, sum + a b over a unit, and how weights
// come about: exp(x) of x <= 0, and their rounding to elements of 16 bits. A Scope lives while they are in
// use.
struct FloatUnits {
  struct Scope {};
  using Element = float;
  static constexpr std::int64_t kElements = 1;
  static HWY_INLINE FloatVec multiply_add(WordVec a, WordVec b, FloatVec sum) {
    return hn::MulAdd(hn::BitCast(kFloat, a), hn::BitCast(kFloat, b), sum);
  }
  static HWY_INLINE FloatVec exp(FloatVec x) { return hn::Exp(kFloat, x); }
};

struct Bfloat16Units {
  struct Scope {};
  using Element = Bfloat16;
  static constexpr std::int64_t kElements = 2;
  static HWY_INLINE FloatVec multiply_add(WordVec a, WordVec b, FloatVec sum) {
    const auto high = hn::Set(kWord, 0xFFFF0000u);
    const auto first = [](WordVec x) HWY_ATTR { return hn::BitCast(kFloat, hn::ShiftLeft<16>(x)); };
    const auto second = [&](WordVec x) HWY_ATTR { return hn::BitCast(kFloat, hn::And(x, high)); };
    return hn::MulAdd(second(a), second(b), hn::MulAdd(first(a), first(b), sum));
  }
  static HWY_INLINE FloatVec exp(FloatVec x) { return hn::Exp(kFloat, x); }
  static HWY_INLINE Bfloat16Vec narrow(FloatVec x) { return HWY_NAMESPACE::narrow(x); }
};

// The same by the processor's own instructions (AVX512_BF16), which are none of Highway's AVX-512 target, and
// with an exponential that is as exact as bfloat16 needs: of relative error 3e-6.
#if HWY_TARGET == HWY_AVX3
struct NativeBfloat16Units : Bfloat16Units {
  static HWY_INLINE FloatVec multiply_add(WordVec a, WordVec b, FloatVec sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
    return sum;
  }
  // 2^t = 2^n 2^f, n whole and f of -1/2 to 1/2, the latter by a polynomial of least relative error.
  static HWY_INLINE FloatVec exp(FloatVec x) {
    const auto t = hn::Mul(x, hn::Set(kFloat, 1.44269504f)), n = hn::Round(t), f = hn::Sub(t, n);
    auto y = hn::Set(kFloat, 9.57010128e-3f);
    for (const float c : {5.59178591e-2f, 0.240247443f, 0.693121791f, 0.999999285f})
      y = hn::MulAdd(y, f, hn::Set(kFloat, c));
    return FloatVec{_mm512_scalef_ps(y.raw, n.raw)};
  }
  static HWY_INLINE Bfloat16Vec narrow(FloatVec x) {
    Bfloat16Vec y;
    asm("vcvtneps2bf16 %1, %0" : "=v"(y.raw) : "v"(x.raw));
    return y;
  }
};

// The tiles of this thread as 16 rows of 64 bytes each; in the end others' setting comes back.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Setting setting{.palette = 1};
    for (int tile = 0; tile < 8; ++tile) {
      setting.row_bytes[tile] = 64;
      setting.rows[tile] = kTile;
    }
    asm volatile("ldtilecfg %0" : : "m"(setting));
  }
  ~TileScope() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Setting {
    std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  Setting before_;
};

// The same by tiles in registers of their own (AMX): see multiply_by_tiles().
struct TileUnits : NativeBfloat16Units {
  using Scope = TileScope;
};
#else
using NativeBfloat16Units = Bfloat16Units;
using TileUnits = Bfloat16Units;
#endif

template <class U>
constexpr std::int64_t units(std::int64_t elements) {
  return (elements + U::kElements - 1) / U::kElements;
}
// Row length in memory of n floats or units: whole vectors of any target, and no multiple of 4 KiB, at which
// rows would share the sets of a cache.
constexpr std::int64_t padded(std::int64_t n) {
  const std::int64_t whole = whole_tiles(n);
  return whole % 64 == 0 ? whole + kTile : whole;
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

#if HWY_TARGET == HWY_AVX3
#define MEGALODON_LOAD_TILE(tile, p, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(p), "r"(bytes) : "memory")
#define MEGALODON_STORE_TILE(tile, p, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(p), "r"(bytes) : "memory")
#define MEGALODON_ZERO_TILE(tile) asm volatile("tilezero %%tmm" #tile : :)
#define MEGALODON_MULTIPLY_TILES(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

// C [16 rows, 16 columns] = A B or C += A B in tiles 0 to 3, with A in 4 and 5, B in 6 and 7.
template <int rows, int columns>
void multiply_tiles(Left a, const Unit* b, std::int64_t b_row, std::int64_t depth, float* c,
                    std::int64_t c_row, bool accumulate) {
  constexpr std::int64_t kBytes = sizeof(Unit);  // and of a float
  const std::int64_t a_bytes = a.row * kBytes, b_bytes = b_row * kBytes, c_bytes = c_row * kBytes;
  float* const below = c + kTile * c_row;
  if (accumulate) {
    MEGALODON_LOAD_TILE(0, c, c_bytes);
    if constexpr (columns > 1) MEGALODON_LOAD_TILE(1, c + kTile, c_bytes);
    if constexpr (rows > 1) MEGALODON_LOAD_TILE(2, below, c_bytes);
    if constexpr (rows > 1 && columns > 1) MEGALODON_LOAD_TILE(3, below + kTile, c_bytes);
  } else {
    MEGALODON_ZERO_TILE(0);
    if constexpr (columns > 1) MEGALODON_ZERO_TILE(1);
    if constexpr (rows > 1) MEGALODON_ZERO_TILE(2);
    if constexpr (rows > 1 && columns > 1) MEGALODON_ZERO_TILE(3);
  }
  for (std::int64_t u = 0; u < depth; u += kTile) {
    const Unit* const left = a.data + u;
    const Unit* const right = b + u * b_row;
    MEGALODON_LOAD_TILE(4, left, a_bytes);
    MEGALODON_LOAD_TILE(6, right, b_bytes);
    MEGALODON_MULTIPLY_TILES(0, 4, 6);
    if constexpr (columns > 1) {
      MEGALODON_LOAD_TILE(7, right + kTile, b_bytes);
      MEGALODON_MULTIPLY_TILES(1, 4, 7);
    }
    if constexpr (rows > 1) {
      MEGALODON_LOAD_TILE(5, left + kTile * a.row, a_bytes);
      MEGALODON_MULTIPLY_TILES(2, 5, 6);
      if constexpr (columns > 1) MEGALODON_MULTIPLY_TILES(3, 5, 7);
    }
  }
  MEGALODON_STORE_TILE(0, c, c_bytes);
  if constexpr (columns > 1) MEGALODON_STORE_TILE(1, c + kTile, c_bytes);
  if constexpr (rows > 1) MEGALODON_STORE_TILE(2, below, c_bytes);
  if constexpr (rows > 1 && columns > 1) MEGALODON_STORE_TILE(3, below + kTile, c_bytes);
}

#undef MEGALODON_LOAD_TILE
#undef MEGALODON_STORE_TILE
#undef MEGALODON_ZERO_TILE
#undef MEGALODON_MULTIPLY_TILES

// 16 rows of 16 units to rows and columns exchanged, to_row apart. from(i) is row i.
template <class F>
HWY_INLINE void transpose_tile(F&& from, Unit* HWY_RESTRICT to, std::int64_t to_row) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from(i));
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {  // x[i + k]: column 4 b + k of rows i .. i + 3 in each 128-bit block b
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const auto a = _mm512_shuffle_i32x4(x[k], x[k + 4], 0x88), b = _mm512_shuffle_i32x4(x[k], x[k + 4], 0xDD);
    const auto c = _mm512_shuffle_i32x4(x[k + 8], x[k + 12], 0x88);
    const auto d = _mm512_shuffle_i32x4(x[k + 8], x[k + 12], 0xDD);
    _mm512_storeu_si512(to + k * to_row, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + (k + 8) * to_row, _mm512_shuffle_i32x4(a, c, 0xDD));
    _mm512_storeu_si512(to + (k + 4) * to_row, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + (k + 12) * to_row, _mm512_shuffle_i32x4(b, d, 0xDD));
  }
}

// multiply() under a TileScope, by the processor's own products of tiles (AMX): 16 rows of 16 units with 16
// units of 16 columns, of which four share what they load. Rows of A that do not lie in a row (step > 1; of
// at most kMostTurned units) are transposed before.
inline constexpr std::int64_t kMostTurned = 64;
template <class F>
void multiply_by_tiles(std::int64_t M, Left a, const Unit* b, std::int64_t b_row, float* c,
                       std::int64_t c_row, bool accumulate, F&& extent) {
  constexpr std::int64_t kPair = 2 * kTile;
  alignas(64) Unit turned[kPair * kMostTurned];
  for (std::int64_t i = 0; i < M; i += kPair) {
    const std::int64_t rows = M - i > kTile ? kPair : kTile;
    const Extent e = extent(i, i + rows - 1);
    const std::int64_t begin = e.begin / kTile * kTile;
    const std::int64_t depth = std::max<std::int64_t>(0, whole_tiles(e.end) - begin);
    Left left{a.data + i * a.row + begin * a.step, a.row, a.step};
    if (a.step != 1) {
      for (std::int64_t u = 0; u < depth; u += kTile) {
        for (std::int64_t r = 0; r < rows; r += kTile)
          transpose_tile([&](std::int64_t k) HWY_ATTR { return left.data + r + (u + k) * a.step; },
                         turned + r * kMostTurned + u, kMostTurned);
      }
      left = {turned, kMostTurned, 1};
    }
    for (std::int64_t j = 0; j < e.columns; j += kPair) {
      const bool wide = e.columns - j > kTile;
      const auto tiles = rows > kTile ? (wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                      : (wide ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      tiles(left, b + begin * b_row + j, b_row, depth, c + i * c_row + j, c_row, accumulate);
    }
  }
}
#endif

// C [M, columns] = A B, or C += A B. `extent(first, last)` of neighbouring rows of C says what is worth
// computing; whole vectors are written. B and C have rows of at least that length.
template <class U, class F>
void multiply(std::int64_t M, std::int64_t columns, Left a, const Unit* b, std::int64_t b_row, float* c,
              std::int64_t c_row, bool accumulate, F&& extent) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (std::is_same_v<U, TileUnits>)
    return multiply_by_tiles(M, a, b, b_row, c, c_row, accumulate, extent);
#endif
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
