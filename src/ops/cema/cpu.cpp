#include "ops/cema/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cema/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "base/parallel.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

// A tile is kLanes neighbouring features of one sequence, one a lane. Its time goes by in blocks of m steps
// (kBlock, but for what is left at the end). With the powers Q_i = q^i, i = 0 .. m, and the kernel
// k_i = Re(sum_n p eta Q_i), k_0 with omega added, a block is
//   s     = sum_j Q_{m-1-j} x_j                                     what the block adds to the state, less p
//   y_j   = sum_{i<=j} k_{j-i} x_i + Re(sum_n Q_{j+1} eta h)        h: the state before the block
//   h'    = Q_m h + p s                                             the state after it
// and backwards, with G' = dL/dh',
//   dx_j  = sum_{i>=j} k_{i-j} dy_i + Re(sum_n conj(Q_{m-1-j}) p G')
//   G     = conj(Q_m) G' + conj(eta) sum_j conj(Q_{j+1}) dy_j
// The gradients of the coefficients follow from those of Q and k, which gather over the blocks in
//   U_i   = sum G' x_{m-1-i},    V_j = sum dy_j h,    dk_i = sum_j dy_{j+i} x_j.
// All of these but the two recurrences are products of small matrices (of vectors, one a lane), done for some
// blocks at once. A step so takes 5 N multiplications forward and 13 N backward, where the recurrence step by
// step would take 6 N and 23 N.
HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

constexpr std::int64_t kBlock = 16;              // steps of a block
constexpr std::int64_t kChunk = 8;               // blocks that are multiplied together
constexpr std::int64_t kRows = 4;                // rows of a product in registers
constexpr std::int64_t kPad = kRows;             // zero vectors around every block: rows come in fours
constexpr std::int64_t kStride = kBlock + kPad;  // vectors from block to block
constexpr std::int64_t kFlush = 64;              // chunks whose gradients are summed in float32

// Vectors of kLanes floats.
class Vectors {
 public:
  explicit Vectors(std::int64_t n)
      : data_(static_cast<float*>(::operator new[](bytes(n), std::align_val_t{kAlignment}))), size_(n) {}
  float* operator[](std::int64_t i) const { return data_.get() + i * kLanes; }
  void clear() const { std::fill_n(data_.get(), size_ * kLanes, 0.0f); }

 private:
  static constexpr std::size_t kAlignment = 64;
  static std::size_t bytes(std::int64_t n) { return static_cast<std::size_t>(n * kLanes) * sizeof(float); }
  struct Delete {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<float[], Delete> data_;
  std::int64_t size_;
};

// Into the cache, whatever lies there: `distance` may lead out of the array. Reads stop at the second level:
// rows of features are often a power of two apart, and a chunk of them falls on few places of the first.
template <class T>
HWY_INLINE std::uintptr_t moved(const T* p, std::int64_t distance) {
  return reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(distance) * sizeof(T);
}
template <class T>
HWY_INLINE void prefetch_to_read(const T* p, std::int64_t distance) {
  __builtin_prefetch(reinterpret_cast<const void*>(moved(p, distance)), 0, 2);
}
template <class T>
HWY_INLINE void prefetch_to_write(const T* p, std::int64_t distance) {
  __builtin_prefetch(reinterpret_cast<const void*>(moved(p, distance)), 1, 3);
}

HWY_INLINE float* at(float* p, std::int64_t vector) {
  return p + vector * kLanes;
}
HWY_INLINE const float* at(const float* p, std::int64_t vector) {
  return p + vector * kLanes;
}

// A matrix of vectors; strides in vectors.
struct Factor {
  const float* data;
  std::int64_t outer, inner;
};
struct Result {
  float* data;
  std::int64_t row, column;
};

// c(r, k) = sum_i a(r, i) b(k, i), or += it, for kRows rows and K columns.
template <std::int64_t K, bool kAdd>
HWY_INLINE void multiply_tile(Factor a, Factor b, Result c, std::int64_t count) {
  FloatVec sum[kRows][K];
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t k = 0; k < K; ++k)
      sum[r][k] = kAdd ? load(at(c.data, r * c.row + k * c.column)) : hn::Zero(kFloat);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    FloatVec a_i[kRows];
    for (std::int64_t r = 0; r < kRows; ++r) a_i[r] = load(at(a.data, r * a.outer + i * a.inner));
    for (std::int64_t k = 0; k < K; ++k) {
      const auto b_i = load(at(b.data, k * b.outer + i * b.inner));
      for (std::int64_t r = 0; r < kRows; ++r) sum[r][k] = hn::MulAdd(a_i[r], b_i, sum[r][k]);
    }
  }
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t k = 0; k < K; ++k) store(sum[r][k], at(c.data, r * c.row + k * c.column));
  }
}

// The same for any number of columns, and of rows rounded up to a multiple of kRows.
template <bool kAdd>
void multiply(std::int64_t rows, std::int64_t columns, Factor a, Factor b, Result c, std::int64_t count) {
  constexpr std::int64_t K = kLanes >= 16 ? 4 : 2;  // AVX-512 has 32 registers, the others 16
  for (std::int64_t r = 0; r < rows; r += kRows) {
    const Factor a_r{at(a.data, r * a.outer), a.outer, a.inner};
    std::int64_t k = 0;
    for (; k + K <= columns; k += K) {
      multiply_tile<K, kAdd>(a_r, {at(b.data, k * b.outer), b.outer, b.inner},
                             {at(c.data, r * c.row + k * c.column), c.row, c.column}, count);
    }
    for (; k < columns; ++k) {
      multiply_tile<1, kAdd>(a_r, {at(b.data, k * b.outer), b.outer, b.inner},
                             {at(c.data, r * c.row + k * c.column), c.row, c.column}, count);
    }
  }
}

// sum += conj(a) b, complex.
HWY_INLINE void add_conjugate_product(FloatVec a_re, FloatVec a_im, FloatVec b_re, FloatVec b_im,
                                      FloatVec& sum_re, FloatVec& sum_im) {
  sum_re = hn::MulAdd(a_re, b_re, hn::MulAdd(a_im, b_im, sum_re));
  sum_im = hn::MulAdd(a_re, b_im, hn::NegMulAdd(a_im, b_re, sum_im));
}

// Between [features, N] (step 1) or [features, N, 2] (step 2: one of the two) and N vectors.
void to_lanes(const float* from, std::int64_t width, std::int64_t N, std::int64_t step, float* to) {
  for (std::int64_t d = 0; d < width; ++d) {
    for (std::int64_t n = 0; n < N; ++n) to[n * kLanes + d] = from[(d * N + n) * step];
  }
}
template <class From>
void from_lanes(const From* from, std::int64_t width, std::int64_t N, std::int64_t step, float* to) {
  for (std::int64_t d = 0; d < width; ++d) {
    for (std::int64_t n = 0; n < N; ++n) to[(d * N + n) * step] = static_cast<float>(from[n * kLanes + d]);
  }
}

// The coefficients of a tile's features and what follows from them. M is N rounded up to even, so that the
// C = 2 M columns of the products (real parts first, then imaginary parts) come in fours; the coefficients
// beyond N are zero.
struct Tables {
  const std::int64_t N, M, C, rows;  // rows: the longest block
  std::int64_t first = -1, width = 0;
  Vectors p, q, eta;
  Vectors powers, kernel;  // behind kPad rows of zero

  explicit Tables(const cpu::CemaShape& s)
      : N(s.N),
        M((s.N + 1) / 2 * 2),
        C(2 * M),
        rows(std::min(s.L, kBlock)),
        p(M),
        q(C),
        eta(C),
        powers((kPad + kBlock + 1) * C),
        kernel(kPad + kBlock) {}

  const float* power(std::int64_t i) const { return powers[(kPad + i) * C]; }
  const float* kernel_from(std::int64_t i) const { return kernel[kPad + i]; }

  void set(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, std::int64_t first_feature) {
    if (first == first_feature) return;
    first = first_feature;
    width = std::min(kLanes, s.D - first);
    for (const auto* v : {&p, &q, &eta, &powers, &kernel}) v->clear();
    to_lanes(c.p + first * N, width, N, 1, p[0]);
    for (const std::int64_t part : {0, 1}) {
      to_lanes(c.q + 2 * first * N + part, width, N, 2, q[part * M]);
      to_lanes(c.eta + 2 * first * N + part, width, N, 2, eta[part * M]);
    }
    to_lanes(c.omega + first, width, 1, 1, kernel[kPad]);
    for (std::int64_t n = 0; n < M; ++n) add_component(n);
  }

 private:
  void add_component(std::int64_t n) {
    const auto q_re = load(q[n]), q_im = load(q[M + n]), p_n = load(p[n]);
    const auto c_re = hn::Mul(p_n, load(eta[n])), c_im = hn::Mul(p_n, load(eta[M + n]));
    auto re = hn::Set(kFloat, 1.0f), im = hn::Zero(kFloat);
    for (std::int64_t i = 0;; ++i) {
      store(re, powers[(kPad + i) * C + n]);
      store(im, powers[(kPad + i) * C + M + n]);
      if (i == rows) break;
      float* k_i = kernel[kPad + i];
      store(hn::MulAdd(c_re, re, hn::NegMulAdd(c_im, im, load(k_i))), k_i);
      const auto next_re = hn::MulSub(re, q_re, hn::Mul(im, q_im));
      im = hn::MulAdd(re, q_im, hn::Mul(im, q_re));
      re = next_re;
    }
  }
};

// h [M complex] of sequence b, from [B, D, N, 2] or zero, and back.
void load_state(const cpu::CemaShape& s, const Tables& t, const float* all, std::int64_t b,
                const Vectors& h) {
  h.clear();
  if (all == nullptr) return;
  for (const std::int64_t part : {0, 1})
    to_lanes(all + 2 * (b * s.D + t.first) * s.N + part, t.width, s.N, 2, h[part * t.M]);
}
void store_state(const cpu::CemaShape& s, const Tables& t, const Vectors& h, std::int64_t b, float* all) {
  for (const std::int64_t part : {0, 1})
    from_lanes(h[part * t.M], t.width, s.N, 2, all + 2 * (b * s.D + t.first) * s.N + part);
}

// A run of equally long blocks of one tile: kChunk whole ones, or what is left.
struct Chunk {
  std::int64_t first_block, blocks, steps;  // steps of a block
};
std::vector<Chunk> chunks_of(std::int64_t L) {
  std::vector<Chunk> chunks;
  const std::int64_t whole = L / kBlock;
  for (std::int64_t i = 0; i < whole; i += kChunk) chunks.push_back({i, std::min(kChunk, whole - i), kBlock});
  if (L % kBlock != 0) chunks.push_back({whole, 1, L % kBlock});
  return chunks;
}

// Steps of a chunk, as vectors in rows of kStride, zero from the block's end on and before the first block.
struct Steps {
  Vectors vectors{kPad + kChunk * kStride};
  Steps() { vectors.clear(); }
  float* operator[](std::int64_t i) const { return vectors[kPad + i]; }

  // `from`, `to`: the chunk's first step. The steps `ahead` of it are fetched into the cache meanwhile.
  template <class T>
  void read(const Chunk& chunk, const T* from, std::int64_t D, std::int64_t width, std::int64_t ahead) const {
    for (std::int64_t b = 0; b < chunk.blocks; ++b) {
      for (std::int64_t j = 0; j < chunk.steps; ++j, from += D) {
        prefetch_to_read(from, ahead * D);
        store(width == kLanes ? load(from) : load_some(from, width), (*this)[b * kStride + j]);
      }
    }
    if (chunk.steps < kBlock) std::fill_n((*this)[chunk.steps], (kBlock - chunk.steps) * kLanes, 0.0f);
  }
  template <class T>
  void write(const Chunk& chunk, T* to, std::int64_t D, std::int64_t width, std::int64_t ahead) const {
    for (std::int64_t b = 0; b < chunk.blocks; ++b) {
      for (std::int64_t j = 0; j < chunk.steps; ++j, to += D) {
        prefetch_to_write(to, ahead * D);
        const auto v = load((*this)[b * kStride + j]);
        if (width == kLanes) {
          store(v, to);
        } else {
          store_some(v, to, width);
        }
      }
    }
  }
};

// s [blocks, C] of the chunk's blocks.
void drive(const Tables& t, const Chunk& c, const Steps& x, float* s) {
  multiply<false>(t.C, c.blocks, {t.power(c.steps - 1), 1, -t.C}, {x[0], kStride, 1}, {s, 1, t.C}, c.steps);
}

// Takes h over the chunk's blocks. `out` [blocks, C] gets the states before them (kStates) or their
// conj(eta h), whose products with Q are then real parts.
template <bool kStates>
void scan(const Tables& t, const Chunk& c, const float* s, const Vectors& h, float* out) {
  for (std::int64_t n = 0; n < t.M; ++n) {
    const auto q_re = load(at(t.power(c.steps), n)), q_im = load(at(t.power(c.steps), t.M + n));
    const auto p = load(t.p[n]), eta_re = load(t.eta[n]), eta_im = load(t.eta[t.M + n]);
    auto re = load(h[n]), im = load(h[t.M + n]);
    for (std::int64_t b = 0; b < c.blocks; ++b) {
      const std::int64_t i = b * t.C + n;
      if constexpr (kStates) {
        store(re, at(out, i));
        store(im, at(out, i + t.M));
      } else {
        store(hn::NegMulAdd(eta_im, im, hn::Mul(eta_re, re)), at(out, i));
        store(hn::Neg(hn::MulAdd(eta_re, im, hn::Mul(eta_im, re))), at(out, i + t.M));
      }
      const auto driven_re = hn::NegMulAdd(q_im, im, hn::Mul(p, load(at(s, i))));
      const auto driven_im = hn::MulAdd(q_im, re, hn::Mul(p, load(at(s, i + t.M))));
      re = hn::MulAdd(q_re, re, driven_re);
      im = hn::MulAdd(q_re, im, driven_im);
    }
    store(re, h[n]);
    store(im, h[t.M + n]);
  }
}

template <class T>
void forward(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x_in, T* y_out, float* h_last,
             std::int64_t begin, std::int64_t end) {
  Tables t(s);
  const Vectors h(t.C), driven(kChunk * t.C), emitted(kChunk * t.C);
  const Steps x, y;
  const auto chunks = chunks_of(s.L);
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t b = item % s.B;
    t.set(s, c, item / s.B * kLanes);
    load_state(s, t, c.h0, b, h);
    for (const auto& chunk : chunks) {
      const std::int64_t offset = (b * s.L + chunk.first_block * kBlock) * s.D + t.first;
      x.read(chunk, x_in + offset, s.D, t.width, kChunk * kBlock);
      drive(t, chunk, x, driven[0]);
      scan<false>(t, chunk, driven[0], h, emitted[0]);
      for (std::int64_t j = 0; j < chunk.steps; j += kRows) {
        multiply<false>(kRows, chunk.blocks, {t.kernel_from(j), 1, -1}, {x[0], kStride, 1},
                        {y[j], 1, kStride}, j + kRows);
      }
      multiply<true>(chunk.steps, chunk.blocks, {t.power(1), t.C, 1}, {emitted[0], t.C, 1},
                     {y[0], 1, kStride}, t.C);
      y.write(chunk, y_out + offset, s.D, t.width, kChunk * kBlock);
    }
    store_state(s, t, h, b, h_last);
  }
}

// `count` complex values at p.
HWY_INLINE void load_complex(const float* p, std::int64_t count, FloatVec& re, FloatVec& im) {
  HWY_ALIGN float buffer[2 * kLanes] = {};
  if (count < kLanes) std::copy_n(p, 2 * count, buffer);
  hn::LoadInterleaved2(kFloat, count < kLanes ? buffer : p, re, im);
}
HWY_INLINE void store_complex(FloatVec re, FloatVec im, std::int64_t count, float* p) {
  if (count == kLanes) return hn::StoreInterleaved2(re, im, kFloat, p);
  HWY_ALIGN float buffer[2 * kLanes];
  hn::StoreInterleaved2(re, im, kFloat, buffer);
  std::copy_n(buffer, 2 * count, p);
}

// One step (decoding): the components of a feature go by lanes, as they lie in memory.
template <class T>
void step(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, T* y, float* h_last,
          std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t d = i % s.D;
    const auto x_i = hn::Set(kFloat, hn::GetLane(load_some(x + i, 1)));
    auto sum = hn::Zero(kFloat);
    for (std::int64_t n = 0; n < s.N; n += kLanes) {
      const std::int64_t count = std::min(kLanes, s.N - n), from = d * s.N + n, state = 2 * (i * s.N + n);
      FloatVec q_re, q_im, eta_re, eta_im, re = hn::Zero(kFloat), im = re;
      load_complex(c.q + 2 * from, count, q_re, q_im);
      load_complex(c.eta + 2 * from, count, eta_re, eta_im);
      if (c.h0 != nullptr) load_complex(c.h0 + state, count, re, im);
      const auto p = count == kLanes ? load(c.p + from) : load_some(c.p + from, count);
      const auto new_re = hn::MulAdd(q_re, re, hn::NegMulAdd(q_im, im, hn::Mul(p, x_i)));
      const auto new_im = hn::MulAdd(q_re, im, hn::Mul(q_im, re));
      store_complex(new_re, new_im, count, h_last + state);
      sum = hn::MulAdd(eta_re, new_re, hn::NegMulAdd(eta_im, new_im, sum));
    }
    const float y_i = sum_of_lanes(sum) + c.omega[d] * hn::GetLane(x_i);
    store_some(hn::Set(kFloat, y_i), y + i, 1);
  }
}

// The gradients of a tile's coefficients for one sequence: M vectors of d_p, C of d_q, C of d_eta, and
// d_omega, in float64.
std::int64_t sums_of(std::int64_t M) {
  return (5 * M + 1) * kLanes;
}

void add_to(FloatVec v, double* sums) {
  HWY_ALIGN float values[kLanes];
  store(v, values);
  for (std::int64_t i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(values[i]);
}

// The gradients of powers and kernel, gathered over some chunks.
struct Gathered {
  const Tables& t;
  Vectors U, V;   // [kBlock, C]
  Vectors dk;     // [kBlock]
  Vectors decay;  // [C]: of q, by way of Q_m

  explicit Gathered(const Tables& tables)
      : t(tables), U(kBlock * t.C), V(kBlock * t.C), dk(kBlock), decay(t.C) {
    clear();
  }
  void clear() {
    for (const auto* v : {&U, &V, &dk, &decay}) v->clear();
  }

  void add(const Chunk& c, const Steps& x, const Steps& dy, const float* h, const float* G) {
    multiply<true>(c.steps, t.C, {x[c.steps - 1], -1, kStride}, {G, 1, t.C}, {U[0], t.C, 1}, c.blocks);
    multiply<true>(c.steps, t.C, {dy[0], 1, kStride}, {h, 1, t.C}, {V[0], t.C, 1}, c.blocks);
    for (std::int64_t b = 0; b < c.blocks * kStride; b += kStride) {
      for (std::int64_t i = 0; i < c.steps; i += kRows)
        multiply<true>(kRows, 1, {dy[b + i], 1, 1}, {x[b], 0, 1}, {dk[i], 1, 0}, c.steps - i);
    }
  }

  // Adds the coefficients' gradients to `sums` and starts anew.
  void flush(double* sums) {
    const std::int64_t M = t.M;
    for (std::int64_t n = 0; n < M; ++n) {
      const auto p = load(t.p[n]), eta_re = load(t.eta[n]), eta_im = load(t.eta[M + n]);
      auto dp = hn::Zero(kFloat), deta_re = dp, deta_im = dp;
      auto dq_re = load(decay[n]), dq_im = load(decay[M + n]);
      auto dQ_re = hn::Zero(kFloat), dQ_im = dQ_re;  // of Q_i, for i = 0 nothing: Q_0 = 1
      auto before_re = dp, before_im = dp;           // i Q_{i-1}
      for (std::int64_t i = 0; i < t.rows; ++i) {
        const auto Q_re = load(at(t.power(i), n)), Q_im = load(at(t.power(i), M + n));
        const auto next_re = load(at(t.power(i + 1), n)), next_im = load(at(t.power(i + 1), M + n));
        const auto U_re = load(U[i * t.C + n]), U_im = load(U[i * t.C + M + n]);
        const auto V_re = load(V[i * t.C + n]), V_im = load(V[i * t.C + M + n]);
        const auto dk_i = load(dk[i]), scaled = hn::Mul(p, dk_i);
        dp = hn::MulAdd(Q_re, hn::MulAdd(dk_i, eta_re, U_re), dp);
        dp = hn::MulAdd(Q_im, hn::NegMulAdd(dk_i, eta_im, U_im), dp);
        deta_re = hn::MulAdd(next_re, V_re, hn::NegMulAdd(next_im, V_im, deta_re));
        deta_im = hn::NegMulAdd(next_re, V_im, hn::NegMulAdd(next_im, V_re, deta_im));
        deta_re = hn::MulAdd(scaled, Q_re, deta_re);
        deta_im = hn::NegMulAdd(scaled, Q_im, deta_im);
        // Q_i gets p U_i + p dk_i conj(eta), and conj(eta V_{i-1}) from the turn before.
        dQ_re = hn::MulAdd(p, U_re, hn::MulAdd(scaled, eta_re, dQ_re));
        dQ_im = hn::MulAdd(p, U_im, hn::NegMulAdd(scaled, eta_im, dQ_im));
        add_conjugate_product(before_re, before_im, dQ_re, dQ_im, dq_re, dq_im);
        dQ_re = hn::NegMulAdd(eta_im, V_im, hn::Mul(eta_re, V_re));
        dQ_im = hn::Neg(hn::MulAdd(eta_re, V_im, hn::Mul(eta_im, V_re)));
        const auto count = hn::Set(kFloat, static_cast<float>(i + 1));
        before_re = hn::Mul(count, Q_re);
        before_im = hn::Mul(count, Q_im);
      }
      add_conjugate_product(before_re, before_im, dQ_re, dQ_im, dq_re, dq_im);
      add_to(dp, sums + n * kLanes);
      add_to(dq_re, sums + (M + n) * kLanes);
      add_to(dq_im, sums + (2 * M + n) * kLanes);
      add_to(deta_re, sums + (3 * M + n) * kLanes);
      add_to(deta_im, sums + (4 * M + n) * kLanes);
    }
    add_to(load(dk[0]), sums + 5 * M * kLanes);
    clear();
  }
};

// Takes G over the chunk's blocks, last first. emitted [blocks, C]: sum_j Q_{j+1} dy_j; h: the states before
// the blocks. Gs [blocks, C] gets G after the blocks, pGs that times p.
void scan_backward(const Tables& t, const Chunk& c, const float* emitted, const float* h, const Vectors& G,
                   float* Gs, float* pGs, Gathered& gathered) {
  for (std::int64_t n = 0; n < t.M; ++n) {
    const auto q_re = load(at(t.power(c.steps), n)), q_im = load(at(t.power(c.steps), t.M + n));
    const auto p = load(t.p[n]), eta_re = load(t.eta[n]), eta_im = load(t.eta[t.M + n]);
    auto re = load(G[n]), im = load(G[t.M + n]);
    auto dQ_re = hn::Zero(kFloat), dQ_im = dQ_re;  // of Q_m
    for (std::int64_t b = c.blocks - 1; b >= 0; --b) {
      const std::int64_t i = b * t.C + n, j = i + t.M;
      store(re, at(Gs, i));
      store(im, at(Gs, j));
      store(hn::Mul(p, re), at(pGs, i));
      store(hn::Mul(p, im), at(pGs, j));
      add_conjugate_product(load(at(h, i)), load(at(h, j)), re, im, dQ_re, dQ_im);
      const auto e_re = load(at(emitted, i)), e_im = load(at(emitted, j));
      auto next_re = hn::NegMulAdd(eta_im, e_im, hn::Mul(eta_re, e_re));
      auto next_im = hn::Neg(hn::MulAdd(eta_re, e_im, hn::Mul(eta_im, e_re)));
      add_conjugate_product(q_re, q_im, re, im, next_re, next_im);
      re = next_re;
      im = next_im;
    }
    store(re, G[n]);
    store(im, G[t.M + n]);
    const auto m = hn::Set(kFloat, static_cast<float>(c.steps));
    auto d_re = load(gathered.decay[n]), d_im = load(gathered.decay[t.M + n]);
    add_conjugate_product(load(at(t.power(c.steps - 1), n)), load(at(t.power(c.steps - 1), t.M + n)),
                          hn::Mul(m, dQ_re), hn::Mul(m, dQ_im), d_re, d_im);
    store(d_re, gathered.decay[n]);
    store(d_im, gathered.decay[t.M + n]);
  }
}

template <class T>
void backward(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x_in, const T* dy_in,
              const float* dh_last, T* dx_out, float* dh0, double* partial_sums, std::int64_t begin,
              std::int64_t end) {
  Tables t(s);
  const std::int64_t C = t.C;
  const Vectors h(C), G(C), borders((s.L + kBlock - 1) / kBlock * C);
  const Vectors driven(kChunk * C), emitted(kChunk * C), Gs(kChunk * C), pGs(kChunk * C);
  const Steps x, dy, dx;
  Gathered gathered(t);
  const auto chunks = chunks_of(s.L);
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t b = item % s.B;
    t.set(s, c, item / s.B * kLanes);
    double* sums = partial_sums + item * sums_of(t.M);
    std::fill_n(sums, sums_of(t.M), 0.0);
    const auto offset = [&](const Chunk& chunk) {
      return (b * s.L + chunk.first_block * kBlock) * s.D + t.first;
    };
    load_state(s, t, c.h0, b, h);
    for (const auto& chunk : chunks) {
      x.read(chunk, x_in + offset(chunk), s.D, t.width, kChunk * kBlock);
      drive(t, chunk, x, driven[0]);
      scan<true>(t, chunk, driven[0], h, borders[chunk.first_block * C]);
    }
    load_state(s, t, dh_last, b, G);
    for (auto i = static_cast<std::int64_t>(chunks.size()) - 1; i >= 0; --i) {
      const auto& chunk = chunks[static_cast<std::size_t>(i)];
      const float* h_in = borders[chunk.first_block * C];
      x.read(chunk, x_in + offset(chunk), s.D, t.width, -kChunk * kBlock);
      dy.read(chunk, dy_in + offset(chunk), s.D, t.width, -kChunk * kBlock);
      multiply<false>(C, chunk.blocks, {t.power(1), 1, C}, {dy[0], kStride, 1}, {emitted[0], 1, C},
                      chunk.steps);
      scan_backward(t, chunk, emitted[0], h_in, G, Gs[0], pGs[0], gathered);
      for (std::int64_t j = 0; j < chunk.steps; j += kRows) {
        multiply<false>(kRows, chunk.blocks, {t.kernel_from(0), -1, 1}, {dy[j], kStride, 1},
                        {dx[j], 1, kStride}, chunk.steps - j);
      }
      multiply<true>(chunk.steps, chunk.blocks, {t.power(chunk.steps - 1), -C, 1}, {pGs[0], C, 1},
                     {dx[0], 1, kStride}, C);
      dx.write(chunk, dx_out + offset(chunk), s.D, t.width, -kChunk * kBlock);
      gathered.add(chunk, x, dy, h_in, Gs[0]);
      if (i % kFlush == 0) gathered.flush(sums);
    }
    if (dh0 != nullptr) store_state(s, t, G, b, dh0);
  }
}

// The sequences' gradients of tiles begin .. end-1, added in order.
void sum_over_batch(const cpu::CemaShape& s, double* partial_sums, const cpu::CemaGradients& g,
                    std::int64_t begin, std::int64_t end) {
  const std::int64_t M = (s.N + 1) / 2 * 2, size = sums_of(M);
  for (std::int64_t tile = begin; tile < end; ++tile) {
    double* sums = partial_sums + tile * s.B * size;
    for (std::int64_t b = 1; b < s.B; ++b) {
      for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[b * size + i];
    }
    const std::int64_t first = tile * kLanes, width = std::min(kLanes, s.D - first);
    from_lanes(sums, width, s.N, 1, g.p + first * s.N);
    for (const std::int64_t part : {0, 1}) {
      from_lanes(sums + (1 + part) * M * kLanes, width, s.N, 2, g.q + 2 * first * s.N + part);
      from_lanes(sums + (3 + part) * M * kLanes, width, s.N, 2, g.eta + 2 * first * s.N + part);
    }
    from_lanes(sums + 5 * M * kLanes, width, 1, 1, g.omega + first);
  }
}

// Items are sequences of a tile, tile by tile; a run of them shares its tables.
constexpr std::int64_t kStepGrain = 1024;
std::int64_t tiles_of(const cpu::CemaShape& s) {
  return (s.D + kLanes - 1) / kLanes;
}
std::int64_t grain_of(const cpu::CemaShape& s) {
  return std::max<std::int64_t>(1, 512 / s.L);
}

template <class T>
void run_forward(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, T* y, float* h_last) {
  if (s.L == 1) {
    parallel_for(s.B * s.D, kStepGrain,
                 [&](std::int64_t begin, std::int64_t end) { step(s, c, x, y, h_last, begin, end); });
  } else {
    parallel_for(tiles_of(s) * s.B, grain_of(s),
                 [&](std::int64_t begin, std::int64_t end) { forward(s, c, x, y, h_last, begin, end); });
  }
}

template <class T>
void run_backward(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, const T* dy,
                  const float* dh_last, T* dx, const cpu::CemaGradients& g) {
  const std::int64_t tiles = tiles_of(s), size = sums_of((s.N + 1) / 2 * 2);
  const std::unique_ptr<double[]> sums(new double[static_cast<std::size_t>(tiles * s.B * size)]);
  parallel_for(tiles * s.B, grain_of(s), [&](std::int64_t begin, std::int64_t end) {
    backward(s, c, x, dy, dh_last, dx, g.h0, sums.get(), begin, end);
  });
  parallel_for(tiles, 1,
               [&](std::int64_t begin, std::int64_t end) { sum_over_batch(s, sums.get(), g, begin, end); });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

template <class T>
void cema_forward(const CemaShape& shape, const CemaCoefficients& c, const T* x, T* y, float* h_last) {
  MEGALODON_DISPATCH(run_forward<T>)(shape, c, x, y, h_last);
}
template <class T>
void cema_backward(const CemaShape& shape, const CemaCoefficients& c, const T* x, const T* dy,
                   const float* dh_last, T* dx, const CemaGradients& gradients) {
  MEGALODON_DISPATCH(run_backward<T>)(shape, c, x, dy, dh_last, dx, gradients);
}

template void cema_forward(const CemaShape&, const CemaCoefficients&, const float*, float*, float*);
template void cema_forward(const CemaShape&, const CemaCoefficients&, const Bfloat16*, Bfloat16*, float*);
template void cema_backward(const CemaShape&, const CemaCoefficients&, const float*, const float*,
                            const float*, float*, const CemaGradients&);
template void cema_backward(const CemaShape&, const CemaCoefficients&, const Bfloat16*, const Bfloat16*,
                            const float*, Bfloat16*, const CemaGradients&);

}  // namespace megalodon::ops::cpu
#endif
