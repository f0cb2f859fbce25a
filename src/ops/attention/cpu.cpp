// Attention by blocks of queries against the keys that they see. The two matrix products of the forward pass
// and the five of the backward pass run on blocks in cache through the register tiles of product-inl.h; at
// these sizes (64 to 512 rows) they keep nearer to the processor's peak than calls of a matrix library, and
// they skip what the causal triangle hides, tile by tile. Softmax online over blocks of keys; the backward
// pass recomputes the weights from the saved logarithms of the denominators.
#include "ops/attention/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "ops/attention/product-inl.h"
#include "ops/attention/task.h"
#include "ops/philox-inl.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {
using cpu::AttentionInputs;
using cpu::AttentionSizes;
using cpu::Task;
using cpu::Workspace;

// --- Packing: rows of elements into the operands of product-inl.h. Padding is zero.

// One row of units.
template <class T>
void pack_row(const T* HWY_RESTRICT x, std::int64_t d, Unit* HWY_RESTRICT to, std::int64_t row) {
  const auto bytes = static_cast<std::size_t>(d) * sizeof(T);
  std::memcpy(to, x, bytes);
  std::memset(reinterpret_cast<char*>(to) + bytes, 0, static_cast<std::size_t>(row) * sizeof(Unit) - bytes);
}

// n rows of d elements, transposed: unit u of row i at to[u row + i]. x(i) is row i.
template <class U, class F>
void pack_transposed(std::int64_t n, std::int64_t d, F&& x, Unit* HWY_RESTRICT to, std::int64_t row) {
  const std::int64_t whole = d / U::kElements, all = units<U>(d);
  for (std::int64_t i = 0; i < row; i += kTile) {
    const std::int64_t count = std::clamp<std::int64_t>(n - i, 0, kTile);
    const char* from[kTile];
    for (std::int64_t j = 0; j < count; ++j) from[j] = reinterpret_cast<const char*>(x(i + j));
    std::int64_t u = 0;
#if HWY_TARGET == HWY_AVX3
    for (; count == kTile && u + kTile <= whole; u += kTile)
      transpose_tile([&](std::int64_t j)
                         HWY_ATTR { return from[j] + static_cast<std::size_t>(u) * sizeof(Unit); },
                     to + u * row + i, row);
#endif
    for (; u < all; ++u) {
      const std::size_t bytes = u < whole ? sizeof(Unit) : sizeof(typename U::Element);
      Unit column[kTile] = {};
      for (std::int64_t j = 0; j < count; ++j)
        std::memcpy(&column[j], from[j] + static_cast<std::size_t>(u) * sizeof(Unit), bytes);
      std::memcpy(to + u * row + i, column, sizeof(column));
    }
  }
}

// n rows of d elements, kElements neighbouring rows to a row of units; zeros to whole tiles.
template <class U, class F>
void pack_stacked(std::int64_t n, std::int64_t d, F&& x, Unit* HWY_RESTRICT to, std::int64_t row) {
  for (std::int64_t u = 0; u < units<U>(n); ++u, to += row) {
    if constexpr (U::kElements == 1) {
      pack_row(x(u), d, to, row);
    } else {
      const Bfloat16* HWY_RESTRICT const low = x(2 * u);
      const Bfloat16* HWY_RESTRICT const high = 2 * u + 1 < n ? x(2 * u + 1) : nullptr;
      for (std::int64_t i = 0; i < d; ++i)
        to[i] = low[i].bits | (high != nullptr ? Unit{high[i].bits} << 16 : Unit{0});
      std::fill(to + d, to + row, 0);
    }
  }
  if constexpr (U::kElements == 2) std::fill_n(to, (whole_tiles(units<U>(n)) - units<U>(n)) * row, 0);
}

// a in the low, b in the high halves.
HWY_INLINE WordVec stack(Bfloat16Vec a, Bfloat16Vec b) {
  return hn::Or(hn::PromoteTo(kWord, a), hn::ShiftLeft<16>(hn::PromoteTo(kWord, b)));
}

// --- Dropout

// The factors (0 or `kept`) of the weights of one query for the keys first .. first + n - 1; first is a
// multiple of 64, and whole 64s are written. dropout_mask.h has the definition.
void dropout_row(const AttentionSizes& sizes, std::int64_t head, std::int64_t position, std::int64_t first,
                 std::int64_t n, float* HWY_RESTRICT factor) {
  const auto p = static_cast<std::uint64_t>(position);
  const auto c0 = hn::Set(kWord, static_cast<std::uint32_t>(p));
  const auto c1 = hn::Set(kWord, static_cast<std::uint32_t>(p >> 32));
  const auto c3 = hn::Set(kWord, static_cast<std::uint32_t>(head));
  const auto least = hn::Set(kWord, sizes.dropout_threshold);
  const auto kept = hn::Set(kFloat, sizes.kept);
  for (std::int64_t group = 0; group < n; group += 64) {
    for (std::int64_t i = 0; i < 16; i += kLanes) {
      const auto counter = static_cast<std::uint32_t>((first + group) / 4 + i);
      const auto w = philox_vectors(sizes.dropout_key,
                                    {c0, c1, hn::Add(hn::Set(kWord, counter), hn::Iota(kWord, 0)), c3});
      const WordVec words[4] = {w.c0, w.c1, w.c2, w.c3};
      for (std::int64_t j = 0; j < 4; ++j) {
        const auto dropped = hn::RebindMask(kFloat, hn::Gt(least, words[j]));
        store(hn::IfThenZeroElse(dropped, kept), factor + group + 16 * j + i);
      }
    }
  }
}

// --- Forward

// The online softmax of one query over a block of n keys: s holds its products with them and takes the
// weights exp(s scale - m) times the dropout factors (if any), zero from n to `width`. Updates the maximum m
// and the sum l of the weights without dropout; returns what earlier sums are to be multiplied by.
template <class U>
float softmax_row(float* HWY_RESTRICT s, std::int64_t n, std::int64_t width, float scale, const float* factor,
                  float& m, float& l) {
  const auto by = hn::Set(kFloat, scale);
  auto highest = hn::Set(kFloat, m);
  for_vectors(n, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto x = hn::Mul(load(s + i), by);
    if constexpr (std::is_same_v<decltype(part), Whole>) {
      highest = hn::Max(highest, x);
    } else {
      const auto mask = hn::FirstN(kFloat, static_cast<std::size_t>(part.n));
      highest = hn::IfThenElse(mask, hn::Max(highest, x), highest);
    }
  });
  const float top = hn::GetLane(hn::MaxOfLanes(kFloat, highest));
  const auto shift = hn::Set(kFloat, top);
  auto sum = hn::Zero(kFloat);
  for_vectors(n, [&](std::int64_t i, auto part) HWY_ATTR {
    auto weight = within(U::exp(hn::MulSub(load(s + i), by, shift)), part);
    sum = hn::Add(sum, weight);
    if (factor != nullptr) weight = hn::Mul(weight, load(factor + i));
    store(weight, s + i);
  });
  for (std::int64_t i = (n + kLanes - 1) / kLanes * kLanes; i < width; i += kLanes)
    store(hn::Zero(kFloat), s + i);
  const float fade = std::exp(m - top);
  m = top;
  l = l * fade + sum_of_lanes(sum);
  return fade;
}

template <class S, class T>
void scale_row(const S* x, float by, std::int64_t d, T* y) {
  const auto factor = hn::Set(kFloat, by);
  for_vectors(
      d, [&](std::int64_t i, auto part) HWY_ATTR { store(hn::Mul(load(x + i, part), factor), y + i, part); });
}

// Columns of scores and weights of n keys: whole tiles of bfloat16 pairs.
constexpr std::int64_t score_width(std::int64_t n) {
  return whole_tiles((n + 1) / 2) * 2;
}

// One block of queries of one head against all keys that they see.
template <class U>
struct ForwardBlock {
  using T = typename U::Element;
  const AttentionSizes& sizes;
  const Task& task;
  Unit *keys, *values;  // [units(dk), key_row] transposed; [units(keys), value_row] stacked
  std::int64_t key_row, value_row;
  Unit *q, *weights;  // [M, q_row]; [M, s_row] (float32: s itself)
  float *s, *o, *factor;
  std::int64_t q_row, s_row;

  static constexpr std::int64_t kQueries = 128, kKeys = 512;

  void run(const AttentionInputs<T>& in, std::int64_t h, std::int64_t first, std::int64_t M, T* out,
           float* lse) const {
    float m[kQueries], l[kQueries];
    std::fill_n(m, M, -std::numeric_limits<float>::infinity());
    std::fill_n(l, M, 0.0f);
    for (std::int64_t i = 0; i < M; ++i)
      pack_row(in.q + task.query(sizes, first + i, h) * sizes.dk, sizes.dk, q + i * q_row, q_row);
    const std::int64_t seen = task.visible(first + M - 1), depth = units<U>(sizes.dk);
    for (std::int64_t k0 = 0; k0 < seen; k0 += kKeys) {
      const std::int64_t n = std::min(kKeys, seen - k0), width = score_width(n);
      const auto visible = [&](std::int64_t i) HWY_ATTR {
        return std::clamp<std::int64_t>(task.visible(first + i) - k0, 0, n);
      };
      multiply<U>(M, n, {q, q_row, 1}, keys + k0, key_row, s, s_row, false,
                  [&](std::int64_t, std::int64_t last) HWY_ATTR { return Extent{visible(last), 0, depth}; });
      for (std::int64_t i = 0; i < M; ++i) {
        float* const row = s + i * s_row;
        const bool drop = sizes.dropout_threshold > 0;
        if (drop) dropout_row(sizes, task.head(sizes, h), task.position + first + i, k0, n, factor);
        const float fade =
            softmax_row<U>(row, visible(i), width, sizes.scale, drop ? factor : nullptr, m[i], l[i]);
        if (k0 > 0 && fade != 1) scale_row(o + i * value_row, fade, sizes.dv, o + i * value_row);
        if constexpr (U::kElements == 2) {
          auto* const to = reinterpret_cast<Bfloat16*>(weights + i * s_row);
          for (std::int64_t j = 0; j < width; j += kLanes) store(U::narrow(load(row + j)), to + j);
        }
      }
      multiply<U>(M, sizes.dv, {weights, s_row, 1}, values + k0 / U::kElements * value_row, value_row, o,
                  value_row, k0 > 0, [&](std::int64_t, std::int64_t last) HWY_ATTR {
                    return Extent{sizes.dv, 0, units<U>(visible(last))};
                  });
    }
    for (std::int64_t i = 0; i < M; ++i) {
      scale_row(o + i * value_row, 1 / l[i], sizes.dv, out + task.query(sizes, first + i, h) * sizes.dv);
      lse[task.head(sizes, h) * sizes.L + task.t + first + i] = m[i] + std::log(l[i]);
    }
  }
};

template <class U>
void forward(const AttentionSizes& sizes, const AttentionInputs<typename U::Element>& in, const Task& task,
             Workspace& workspace, typename U::Element* o, float* lse) {
  using Block = ForwardBlock<U>;
  const std::int64_t n = task.keys(), rows = whole_tiles(std::min(Block::kQueries, task.queries));
  const std::int64_t s_row = padded(score_width(std::min(Block::kKeys, n))), key_row = padded(n);
  const std::int64_t q_row = padded(units<U>(sizes.dk)), value_row = padded(sizes.dv);
  workspace.reset();
  Block block{sizes,
              task,
              workspace.take<Unit>(units<U>(sizes.dk) * key_row),
              workspace.take<Unit>(whole_tiles(units<U>(n)) * value_row),
              key_row,
              value_row,
              workspace.take<Unit>(rows * q_row),
              nullptr,
              workspace.take<float>(rows * s_row),
              workspace.take<float>(rows * value_row),
              workspace.take<float>(Block::kKeys),
              q_row,
              s_row};
  block.weights = U::kElements == 1 ? reinterpret_cast<Unit*>(block.s) : workspace.take<Unit>(rows * s_row);
  const auto key = [&](std::int64_t i) HWY_ATTR { return task.key(sizes, in, i); };
  const auto value = [&](std::int64_t i) HWY_ATTR { return task.value(sizes, in, i); };
  pack_transposed<U>(n, sizes.dk, key, block.keys, key_row);
  pack_stacked<U>(n, sizes.dv, value, block.values, value_row);
  for (std::int64_t h = 0; h < sizes.H / sizes.Hkv; ++h)
    for (std::int64_t first = 0; first < task.queries; first += Block::kQueries)
      block.run(in, h, first, std::min(Block::kQueries, task.queries - first), o, lse);
}

// --- Few queries, as in decoding: each key and value is read once, where it lies, and nothing is packed.

// The cache lines of n elements at p, on their way before they are needed.
template <class T>
HWY_INLINE void prefetch(const T* p, std::int64_t n) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// The keys begin .. end-1 for all query rows (head by head) of a task whose keys and values are those of all
// key heads, so that they are read as they lie. Results to be joined with those of the other keys: for each
// row its maximum, its sum of weights, and its sum of weighted values [dv], `row` floats apart.
template <class T>
void decode(const AttentionSizes& sizes, const AttentionInputs<T>& in, const Task& task, std::int64_t begin,
            std::int64_t end, float* HWY_RESTRICT parts, std::int64_t row, Workspace& workspace) {
  const std::int64_t rows = sizes.H * task.queries, of_key = rows / sizes.Hkv;
  const std::int64_t q_row = padded(sizes.dk), s_row = padded(end - begin);
  workspace.reset();
  float* const q = workspace.take<float>(rows * q_row);
  float* const s = workspace.take<float>(rows * s_row);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::fill_n(q + r * q_row, q_row, 0.0f);
    scale_row(in.q + task.query(sizes, r % task.queries, r / task.queries) * sizes.dk, sizes.scale, sizes.dk,
              q + r * q_row);
  }
  for (std::int64_t j = begin; j < end; ++j) {
    const T* const keys = task.key(sizes, in, j);
    prefetch(task.value(sizes, in, j), sizes.Hkv * sizes.dv);
    for (std::int64_t g = 0; g < sizes.Hkv; ++g) {
      const T* const key = keys + g * sizes.dk;
      for (std::int64_t r = g * of_key; r < (g + 1) * of_key; ++r) {
        auto sum = hn::Zero(kFloat);
        for_vectors(sizes.dk, [&](std::int64_t i, auto part) HWY_ATTR {
          sum = hn::MulAdd(load(key + i, part), load(q + r * q_row + i), sum);
        });
        s[r * s_row + j - begin] = sum_of_lanes(sum);
      }
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    float* const out = parts + r * row;
    out[0] = -std::numeric_limits<float>::infinity();
    out[1] = 0;
    const std::int64_t n = std::clamp<std::int64_t>(task.visible(r % task.queries) - begin, 0, end - begin);
    if (n > 0) softmax_row<FloatUnits>(s + r * s_row, n, s_row, 1, nullptr, out[0], out[1]);
    if (n == 0) std::fill_n(s + r * s_row, s_row, 0.0f);
    std::fill_n(out + 2, sizes.dv, 0.0f);
  }
  constexpr std::int64_t kAtOnce = 4;  // values that a pass over a row's sums adds
  for (std::int64_t j = begin; j < end; j += kAtOnce) {
    const T* values[kAtOnce];  // beyond the end: the last one, with weight zero in the padding of s
    for (std::int64_t v = 0; v < kAtOnce; ++v) values[v] = task.value(sizes, in, std::min(j + v, end - 1));
    for (std::int64_t g = 0; g < sizes.Hkv; ++g) {
      for (std::int64_t r = g * of_key; r < (g + 1) * of_key; ++r) {
        const float* const weight = s + r * s_row + j - begin;
        float* const out = parts + r * row + 2;
        for_vectors(sizes.dv, [&](std::int64_t i, auto part) HWY_ATTR {
          auto sum = load(out + i, part);
          for (std::int64_t v = 0; v < kAtOnce; ++v)
            sum = hn::MulAdd(hn::Set(kFloat, weight[v]), load(values[v] + g * sizes.dv + i, part), sum);
          store(sum, out + i, part);
        });
      }
    }
  }
}

// Joins the parts of one query row in their order.
template <class T>
void join(const float* parts, std::int64_t count, std::int64_t stride, std::int64_t dv,
          float* HWY_RESTRICT sums, T* o, float* lse) {
  float top = -std::numeric_limits<float>::infinity(), l = 0;
  for (std::int64_t p = 0; p < count; ++p) top = std::max(top, parts[p * stride]);
  std::fill_n(sums, dv, 0.0f);
  for (std::int64_t p = 0; p < count; ++p) {
    const float* const part = parts + p * stride;
    const auto fade = hn::Set(kFloat, std::exp(part[0] - top));
    l += hn::GetLane(fade) * part[1];
    for_vectors(dv, [&](std::int64_t i, auto some) HWY_ATTR {
      store(hn::MulAdd(load(part + 2 + i, some), fade, load(sums + i, some)), sums + i, some);
    });
  }
  scale_row(sums, 1 / l, dv, o);
  *lse = top + std::log(l);
}

// --- Backward

// One block of queries of one head: with P the weights, D the dropout factors and dP = (do v^T) D,
// dS = P (dP - delta) scale, delta = sum(o do); dv += (P D)^T do, dk += dS^T q, dq = dS k.
template <class U>
struct BackwardBlock {
  using T = typename U::Element;
  const AttentionSizes& sizes;
  const Task& task;
  std::int64_t key_row, k_row, v_row, q_row, do_row, s_row;
  Unit *keys, *values, *stacked_keys;  // [units(dk), key_row], [units(dv), key_row], [units(keys), k_row]
  float *dk, *dv;                      // [keys, k_row], [keys, v_row]
  Unit *q, *d_o, *stacked_q, *stacked_do;
  float *s, *dp, *dq, *factor;
  Unit *weights, *ds, *stacked_ds;  // stacked over queries, rows over keys, stacked over queries

  static constexpr std::int64_t kQueries = 128, kKeys = 256;

  void load_queries(const AttentionInputs<T>& in, const T* o, const T* upstream, std::int64_t h,
                    std::int64_t first, std::int64_t M, float* delta) const {
    const auto q_at = [&](std::int64_t i)
                          HWY_ATTR { return in.q + task.query(sizes, first + i, h) * sizes.dk; };
    const auto do_at = [&](std::int64_t i)
                           HWY_ATTR { return upstream + task.query(sizes, first + i, h) * sizes.dv; };
    pack_stacked<U>(M, sizes.dk, q_at, stacked_q, k_row);
    pack_stacked<U>(M, sizes.dv, do_at, stacked_do, v_row);
    for (std::int64_t i = 0; i < M; ++i) {
      if constexpr (U::kElements == 2) {
        pack_row(q_at(i), sizes.dk, q + i * q_row, q_row);
        pack_row(do_at(i), sizes.dv, d_o + i * do_row, do_row);
      }
      const T* const o_i = o + task.query(sizes, first + i, h) * sizes.dv;
      const T* const do_i = do_at(i);
      auto sum = hn::Zero(kFloat);
      for_vectors(sizes.dv, [&](std::int64_t j, auto part) HWY_ATTR {
        sum = hn::MulAdd(load(o_i + j, part), load(do_i + j, part), sum);
      });
      delta[i] = sum_of_lanes(sum);
    }
  }

  // P D and dS of query i for n keys, in place of its products s and dp.
  void differentiate_row(std::int64_t i, std::int64_t n, std::int64_t width, const float* drop, float log_sum,
                         float delta) const {
    float* const s_i = s + i * s_row;
    float* const dp_i = dp + i * s_row;
    const auto by = hn::Set(kFloat, sizes.scale), shift = hn::Set(kFloat, log_sum);
    const auto mean = hn::Set(kFloat, delta);
    for_vectors(n, [&](std::int64_t j, auto part) HWY_ATTR {
      const auto weight = U::exp(hn::MulSub(load(s_i + j), by, shift));
      auto kept = weight, slope = load(dp_i + j);
      if (drop != nullptr) {
        const auto factor_j = load(drop + j);
        kept = hn::Mul(kept, factor_j);
        slope = hn::Mul(slope, factor_j);
      }
      store(within(kept, part), s_i + j);
      store(within(hn::Mul(hn::Mul(weight, by), hn::Sub(slope, mean)), part), dp_i + j);
    });
    for (std::int64_t j = (n + kLanes - 1) / kLanes * kLanes; j < width; j += kLanes) {
      store(hn::Zero(kFloat), s_i + j);
      store(hn::Zero(kFloat), dp_i + j);
    }
  }

  // The bfloat16 operands of the next products, zeros to whole tiles.
  void pack_weights(std::int64_t M, std::int64_t width) const {
    for (std::int64_t i = units<U>(M); i < whole_tiles(units<U>(M)); ++i) {
      std::fill_n(weights + i * s_row, width, 0);
      std::fill_n(stacked_ds + i * s_row, width, 0);
    }
    for (std::int64_t i = 0; i < M; i += 2) {
      const bool pair = i + 1 < M;
      auto* const rows = reinterpret_cast<Bfloat16*>(ds + i * s_row);
      for (std::int64_t j = 0; j < width; j += kLanes) {
        const auto row = [&](const float* x) HWY_ATTR { return U::narrow(load(x + i * s_row + j)); };
        const auto next = [&](const float* x) HWY_ATTR {
          return U::narrow(pair ? load(x + (i + 1) * s_row + j) : hn::Zero(kFloat));
        };
        const auto slope = row(dp), slope_below = next(dp);
        hn::StoreU(stack(row(s), next(s)), kWord, weights + i / 2 * s_row + j);
        hn::StoreU(stack(slope, slope_below), kWord, stacked_ds + i / 2 * s_row + j);
        store(slope, rows + j);
        if (pair) store(slope_below, rows + 2 * s_row + j);
      }
    }
  }

  void run(const AttentionInputs<T>& in, const T* o, const float* lse, const T* upstream, std::int64_t h,
           std::int64_t first, std::int64_t M, T* d_q) const {
    float delta[kQueries];
    load_queries(in, o, upstream, h, first, M, delta);
    const std::int64_t seen = task.visible(first + M - 1);
    const float* const log_sums = lse + task.head(sizes, h) * sizes.L + task.t + first;
    for (std::int64_t k0 = 0; k0 < seen; k0 += kKeys) {
      const std::int64_t n = std::min(kKeys, seen - k0), width = score_width(n);
      const auto visible = [&](std::int64_t i) HWY_ATTR {
        return std::clamp<std::int64_t>(task.visible(first + i) - k0, 0, n);
      };
      const auto rows = [&](std::int64_t depth) HWY_ATTR {
        return [=](std::int64_t, std::int64_t last) HWY_ATTR { return Extent{visible(last), 0, depth}; };
      };
      multiply<U>(M, n, {q, q_row, 1}, keys + k0, key_row, s, s_row, false, rows(units<U>(sizes.dk)));
      multiply<U>(M, n, {d_o, do_row, 1}, values + k0, key_row, dp, s_row, false, rows(units<U>(sizes.dv)));
      const bool drop = sizes.dropout_threshold > 0;
      for (std::int64_t i = 0; i < M; ++i) {
        if (drop) dropout_row(sizes, task.head(sizes, h), task.position + first + i, k0, n, factor);
        differentiate_row(i, visible(i), width, drop ? factor : nullptr, log_sums[i], delta[i]);
      }
      if constexpr (U::kElements == 2) pack_weights(M, width);

      // A key is seen from query `first_query` of the block on.
      const auto columns = [&](std::int64_t d) HWY_ATTR {
        return [=, this](std::int64_t key, std::int64_t) HWY_ATTR {
          const std::int64_t first_query = std::clamp<std::int64_t>(k0 + key + 1 - task.visible(first), 0, M);
          return Extent{d, first_query / U::kElements, units<U>(M)};
        };
      };
      multiply<U>(n, sizes.dv, {weights, 1, s_row}, stacked_do, v_row, dv + k0 * v_row, v_row, true,
                  columns(sizes.dv));
      multiply<U>(n, sizes.dk, {stacked_ds, 1, s_row}, stacked_q, k_row, dk + k0 * k_row, k_row, true,
                  columns(sizes.dk));
      multiply<U>(M, sizes.dk, {ds, s_row, 1}, stacked_keys + k0 / U::kElements * k_row, k_row, dq, k_row,
                  k0 > 0, [&](std::int64_t, std::int64_t last) HWY_ATTR {
                    return Extent{sizes.dk, 0, units<U>(visible(last))};
                  });
    }
    for (std::int64_t i = 0; i < M; ++i)
      scale_row(dq + i * k_row, 1, sizes.dk, d_q + task.query(sizes, first + i, h) * sizes.dk);
  }
};

template <class T>
void emit_row(const float* x, std::int64_t d, T* y, bool add) {
  for_vectors(d, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto x_i = load(x + i, part);
    store(add ? hn::Add(x_i, load(y + i, part)) : x_i, y + i, part);
  });
}

template <class U, class G>
void backward(const AttentionSizes& sizes, const AttentionInputs<typename U::Element>& in, const Task& task,
              Workspace& workspace, const typename U::Element* o, const float* lse,
              const typename U::Element* upstream, typename U::Element* dq, G* dk, G* dv) {
  using Block = BackwardBlock<U>;
  const std::int64_t n = task.keys(), M = whole_tiles(std::min(Block::kQueries, task.queries));
  const std::int64_t depth_k = units<U>(sizes.dk), depth_v = units<U>(sizes.dv);
  const std::int64_t key_row = padded(n), k_row = padded(sizes.dk), v_row = padded(sizes.dv);
  const std::int64_t s_row = padded(score_width(std::min(Block::kKeys, n)));
  workspace.reset();
  const auto take = [&](std::int64_t count) { return workspace.take<Unit>(count); };
  const auto take_floats = [&](std::int64_t count) { return workspace.take<float>(count); };
  Block block{.sizes = sizes,
              .task = task,
              .key_row = key_row,
              .k_row = k_row,
              .v_row = v_row,
              .q_row = padded(depth_k),
              .do_row = padded(depth_v),
              .s_row = s_row,
              .keys = take(depth_k * key_row),
              .values = take(depth_v * key_row),
              .stacked_keys = take(whole_tiles(units<U>(n)) * k_row),
              .dk = take_floats(whole_tiles(n) * k_row),
              .dv = take_floats(whole_tiles(n) * v_row),
              .q = take(M * k_row),
              .d_o = take(M * v_row),
              .stacked_q = nullptr,
              .stacked_do = nullptr,
              .s = take_floats(M * s_row),
              .dp = take_floats(M * s_row),
              .dq = take_floats(M * k_row),
              .factor = take_floats(Block::kKeys),
              .weights = nullptr,
              .ds = nullptr,
              .stacked_ds = nullptr};
  if constexpr (U::kElements == 1) {  // rows and stacks are the same
    block.stacked_q = block.q;
    block.stacked_do = block.d_o;
    block.weights = reinterpret_cast<Unit*>(block.s);
    block.ds = block.stacked_ds = reinterpret_cast<Unit*>(block.dp);
  } else {
    block.stacked_q = take(M * k_row);
    block.stacked_do = take(M * v_row);
    block.weights = take(M * s_row);
    block.ds = take(M * s_row);
    block.stacked_ds = take(M * s_row);
  }
  const auto key = [&](std::int64_t i) HWY_ATTR { return task.key(sizes, in, i); };
  const auto value = [&](std::int64_t i) HWY_ATTR { return task.value(sizes, in, i); };
  pack_transposed<U>(n, sizes.dk, key, block.keys, key_row);
  pack_transposed<U>(n, sizes.dv, value, block.values, key_row);
  pack_stacked<U>(n, sizes.dk, key, block.stacked_keys, k_row);
  std::fill_n(block.dk, n * k_row, 0.0f);
  std::fill_n(block.dv, n * v_row, 0.0f);
  for (std::int64_t h = 0; h < sizes.H / sizes.Hkv; ++h)
    for (std::int64_t first = 0; first < task.queries; first += Block::kQueries)
      block.run(in, o, lse, upstream, h, first, std::min(Block::kQueries, task.queries - first), dq);
  const bool add = sizes.previous_chunks > 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t row = task.fresh_key(sizes, i);
    emit_row(block.dk + i * k_row, sizes.dk, dk + row * sizes.dk, add);
    emit_row(block.dv + i * v_row, sizes.dv, dv + row * sizes.dv, add);
  }
}

// By which products elements of type T are multiplied.
template <class T, Bfloat16Products products>
using UnitsOf =
    std::conditional_t<std::is_same_v<T, float>, FloatUnits,
                       std::conditional_t<products == Bfloat16Products::tiles, TileUnits,
                                          std::conditional_t<products == Bfloat16Products::pairs,
                                                             NativeBfloat16Units, Bfloat16Units>>>;
template <class T, Bfloat16Products products>
void forward_task(const AttentionSizes& sizes, const AttentionInputs<T>& in, const Task& task,
                  Workspace& workspace, T* o, float* lse) {
  using U = UnitsOf<T, products>;
  [[maybe_unused]] const typename U::Scope scope{};
  forward<U>(sizes, in, task, workspace, o, lse);
}

template <class T, Bfloat16Products products, class G>
void backward_task(const AttentionSizes& sizes, const AttentionInputs<T>& in, const Task& task,
                   Workspace& workspace, const T* o, const float* lse, const T* upstream, T* dq, G* dk,
                   G* dv) {
  using U = UnitsOf<T, products>;
  [[maybe_unused]] const typename U::Scope scope{};
  backward<U>(sizes, in, task, workspace, o, lse, upstream, dq, dk, dv);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {
namespace {

// choose(std::integral_constant) for the best products of these shapes.
template <class T, class F>
auto with_products(const AttentionSizes& sizes, F&& choose) {
  using enum Bfloat16Products;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    // Queries and values are packed to their own ends: these must be tiles' ends.
    const bool whole = sizes.dk % 32 == 0 && sizes.dv % 32 == 0;
    const auto products = bfloat16_products();
    if (products == tiles && whole) return choose(std::integral_constant<Bfloat16Products, tiles>());
    if (products != widened) return choose(std::integral_constant<Bfloat16Products, pairs>());
  }
  return choose(std::integral_constant<Bfloat16Products, widened>());
}

// Calls f(i, workspace) for i of 0 .. n-1, on all threads, whoever is free next: results must not depend on
// who does what.
template <class F>
void for_all(std::int64_t n, F&& f) {
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min<std::int64_t>(n, thread_count()), 1, [&](std::int64_t, std::int64_t) {
    Workspace workspace;
    for (std::int64_t i = next++; i < n; i = next++) f(i, workspace);
  });
}

void longest_first(std::vector<Task>& tasks) {
  std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return a.queries * (a.visible(0) + a.keys()) > b.queries * (b.visible(0) + b.keys());
  });
}

// A task with few queries, for all heads, its keys in parts that do not depend on the number of threads.
struct Few {
  static constexpr std::int64_t kRows = 8;  // queries of a key, at most
  static constexpr std::int64_t kKeys = 128;
  Task task;
  std::int64_t parts, offset;  // of its results, in rows
};

template <class T>
void decode_all(const AttentionSizes& sizes, const AttentionInputs<T>& in, const std::vector<Task>& tasks,
                T* o, float* lse) {
  const std::int64_t row = sizes.dv + 2;
  std::vector<Few> few;
  std::vector<std::pair<std::size_t, std::int64_t>> parts;  // (task, which of its parts)
  std::int64_t total = 0;
  for (const auto& task : tasks) {
    few.push_back({task, (task.keys() + Few::kKeys - 1) / Few::kKeys, total});
    for (std::int64_t p = 0; p < few.back().parts; ++p) parts.emplace_back(few.size() - 1, p);
    total += few.back().parts * sizes.H * task.queries;
  }
  const auto results = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(total * row));
  const auto decode_part = MEGALODON_DISPATCH(decode<T>);
  for_all(static_cast<std::int64_t>(parts.size()), [&](std::int64_t i, Workspace& workspace) {
    const auto [index, part] = parts[static_cast<std::size_t>(i)];
    const auto& [task, count, offset] = few[index];
    const std::int64_t begin = part * Few::kKeys, end = std::min(begin + Few::kKeys, task.keys());
    decode_part(sizes, in, task, begin, end, results.get() + (offset + part * sizes.H * task.queries) * row,
                row, workspace);
  });
  const auto join_parts = MEGALODON_DISPATCH(join<T>);
  for_all(static_cast<std::int64_t>(few.size()), [&](std::int64_t index, Workspace& workspace) {
    const auto& [task, count, offset] = few[static_cast<std::size_t>(index)];
    workspace.reset();
    auto* const sums = workspace.take<float>(sizes.dv);
    for (std::int64_t r = 0; r < sizes.H * task.queries; ++r) {
      const std::int64_t query = r % task.queries, h = r / task.queries;
      join_parts(results.get() + (offset + r) * row, count, sizes.H * task.queries * row, sizes.dv, sums,
                 o + task.query(sizes, query, h) * sizes.dv,
                 lse + task.head(sizes, h) * sizes.L + task.t + query);
    }
  });
}

constexpr std::int64_t kLongest = 512;  // queries of a forward task: enough to repay the packing of its keys

template <class T>
void forward_all(const AttentionSizes& sizes, const AttentionInputs<T>& in, const std::vector<Task>& tasks,
                 T* o, float* lse) {
  std::vector<Task> many, few;
  for (const auto& task : tasks) {
    const bool is_few = sizes.H / sizes.Hkv * task.queries <= Few::kRows && sizes.dropout_threshold == 0;
    if (!is_few) many.push_back(task);
    if (is_few && task.g == 0) few.push_back(task);
  }
  longest_first(many);
  const auto kernel =
      with_products<T>(sizes, [](auto products) { return MEGALODON_DISPATCH(forward_task<T, products()>); });
  for_all(static_cast<std::int64_t>(many.size()), [&](std::int64_t i, Workspace& workspace) {
    kernel(sizes, in, many[static_cast<std::size_t>(i)], workspace, o, lse);
  });
  if (!few.empty()) decode_all(sizes, in, few, o, lse);
}

template <class T, class G>
void backward_all(const AttentionSizes& sizes, const AttentionInputs<T>& in, std::vector<Task> tasks,
                  const T* o, const float* lse, const T* d_o, T* dq, G* dk, G* dv) {
  const auto kernel = with_products<T>(
      sizes, [](auto products) { return MEGALODON_DISPATCH(backward_task<T, products(), G>); });
  longest_first(tasks);
  for_all(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, Workspace& workspace) {
    kernel(sizes, in, tasks[static_cast<std::size_t>(i)], workspace, o, lse, d_o, dq, dk, dv);
  });
}

}  // namespace

template <class T>
void attention_forward(const AttentionSizes& sizes, const AttentionInputs<T>& in, T* o, float* lse) {
  forward_all(sizes, in, tasks_of(sizes, in.start, kLongest), o, lse);
}

template <class T, class G>
void attention_backward(const AttentionSizes& sizes, const AttentionInputs<T>& in, const T* o,
                        const float* lse, const T* d_o, T* dq, G* dk, G* dv) {
  // Chunks that share keys add to them in turn.
  const std::int64_t turns = sizes.chunk > 0 ? sizes.previous_chunks + 1 : 1;
  const auto all = tasks_of(sizes, in.start, sizes.L);
  for (std::int64_t turn = 0; turn < turns; ++turn) {
    std::vector<Task> tasks;
    std::copy_if(all.begin(), all.end(), std::back_inserter(tasks),
                 [&](const Task& task) { return turns == 1 || task.position / sizes.chunk % turns == turn; });
    backward_all(sizes, in, std::move(tasks), o, lse, d_o, dq, dk, dv);
  }
}

template <class T>
void packed_attention_forward(const AttentionSizes& sizes, const AttentionInputs<T>& in,
                              const AttentionBorders& borders, T* o, float* lse) {
  forward_all(sizes, in, tasks_of(sizes, borders, kLongest), o, lse);
}

template <class T>
void packed_attention_backward(const AttentionSizes& sizes, const AttentionInputs<T>& in,
                               const AttentionBorders& borders, const T* o, const float* lse, const T* d_o,
                               T* dq, T* dk, T* dv) {
  backward_all(sizes, in, tasks_of(sizes, borders, sizes.L), o, lse, d_o, dq, dk, dv);
}

#define MEGALODON_INSTANTIATE(T)                                                                             \
  template void attention_forward(const AttentionSizes&, const AttentionInputs<T>&, T*, float*);             \
  template void attention_backward(const AttentionSizes&, const AttentionInputs<T>&, const T*, const float*, \
                                   const T*, T*, T*, T*);                                                    \
  template void packed_attention_forward(const AttentionSizes&, const AttentionInputs<T>&,                   \
                                         const AttentionBorders&, T*, float*);                               \
  template void packed_attention_backward(const AttentionSizes&, const AttentionInputs<T>&,                  \
                                          const AttentionBorders&, const T*, const float*, const T*, T*, T*, \
                                          T*);
MEGALODON_INSTANTIATE(float)
MEGALODON_INSTANTIATE(Bfloat16)
#undef MEGALODON_INSTANTIATE
template void attention_backward(const AttentionSizes&, const AttentionInputs<Bfloat16>&, const Bfloat16*,
                                 const float*, const Bfloat16*, Bfloat16*, float*, float*);

}  // namespace megalodon::ops::cpu
#endif
