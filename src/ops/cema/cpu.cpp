#include "ops/cema/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cema/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

// A tile is kLanes neighbouring features, one a lane. Time goes by in blocks: a block of x is read once into
// a buffer, a few components at a time run through it with their states in registers, and what they add to y
// gathers in a buffer that is written once. The backward pass first runs forward keeping only the states at
// the blocks' borders; then, last block first, it computes the states inside the block again and runs the
// adjoint recurrence
//   G_{t-1} = conj(q) G_t + conj(eta) dy_{t-1},   G_t = dL/dh_t.
HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

constexpr std::int64_t kBlock = 32;                  // steps
constexpr std::int64_t kForward = 4, kBackward = 2;  // components at a time: as many as the registers hold

constexpr std::int64_t padded(std::int64_t N) {
  return (N + kForward - 1) / kForward * kForward;
}

// Per component one vector of each, transposed from [D, N]; components from N to the padded number are zero.
struct Tile {
  std::int64_t first, width, N;  // features first .. first+width-1
  std::vector<float> p, q_re, q_im, eta_re, eta_im, omega;

  Tile(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, std::int64_t first_feature)
      : first(first_feature), width(std::min(kLanes, s.D - first_feature)), N(s.N) {
    const auto size = static_cast<std::size_t>(padded(N) * kLanes);
    for (auto* v : {&p, &q_re, &q_im, &eta_re, &eta_im}) v->assign(size, 0.0f);
    omega.assign(static_cast<std::size_t>(kLanes), 0.0f);
    for (std::int64_t d = 0; d < width; ++d) {
      omega[static_cast<std::size_t>(d)] = c.omega[first + d];
      for (std::int64_t n = 0; n < N; ++n) {
        const auto to = static_cast<std::size_t>(n * kLanes + d);
        const std::int64_t from = (first + d) * N + n;
        p[to] = c.p[from];
        q_re[to] = c.q[2 * from];
        q_im[to] = c.q[2 * from + 1];
        eta_re[to] = c.eta[2 * from];
        eta_im[to] = c.eta[2 * from + 1];
      }
    }
  }
};

// Complex values of a tile, [padded N] vectors of real and of imaginary parts, and their place in [B, D, N,
// 2].
struct State {
  std::vector<float> re, im;
  explicit State(std::int64_t N)
      : re(static_cast<std::size_t>(padded(N) * kLanes)), im(static_cast<std::size_t>(padded(N) * kLanes)) {}

  void load(const float* all, const Tile& tile, const cpu::CemaShape& s, std::int64_t b) {
    std::fill(re.begin(), re.end(), 0.0f);
    std::fill(im.begin(), im.end(), 0.0f);
    if (all == nullptr) return;
    visit(tile, s, b, [&](std::size_t here, std::int64_t there) {
      re[here] = all[there];
      im[here] = all[there + 1];
    });
  }
  void store(float* all, const Tile& tile, const cpu::CemaShape& s, std::int64_t b) const {
    visit(tile, s, b, [&](std::size_t here, std::int64_t there) {
      all[there] = re[here];
      all[there + 1] = im[here];
    });
  }
  template <class F>
  static void visit(const Tile& tile, const cpu::CemaShape& s, std::int64_t b, const F& f) {
    for (std::int64_t d = 0; d < tile.width; ++d) {
      for (std::int64_t n = 0; n < s.N; ++n) {
        f(static_cast<std::size_t>(n * kLanes + d), 2 * ((b * s.D + tile.first + d) * s.N + n));
      }
    }
  }
};

template <class T>
void load_block(const T* x, std::int64_t steps, std::int64_t D, std::int64_t width, float* buffer) {
  for (std::int64_t t = 0; t < steps; ++t) {
    const T* row = x + t * D;
    hn::StoreU(width == kLanes ? load(row) : load_some(row, width), kFloat, buffer + t * kLanes);
  }
}
template <class T>
void store_block(const float* buffer, std::int64_t steps, std::int64_t D, std::int64_t width, T* y) {
  for (std::int64_t t = 0; t < steps; ++t) {
    const auto v = hn::LoadU(kFloat, buffer + t * kLanes);
    if (width == kLanes) {
      store(v, y + t * D);
    } else {
      store_some(v, y + t * D, width);
    }
  }
}

// Registers of K components. h = q h + p x.
template <std::int64_t K>
struct Recurrence {
  FloatVec p[K], q_re[K], q_im[K], re[K], im[K];

  HWY_INLINE Recurrence(const Tile& tile, const State& h, std::int64_t n) {
    for (std::int64_t k = 0; k < K; ++k) {
      const std::int64_t at = (n + k) * kLanes;
      p[k] = load(tile.p.data() + at);
      q_re[k] = load(tile.q_re.data() + at);
      q_im[k] = load(tile.q_im.data() + at);
      re[k] = load(h.re.data() + at);
      im[k] = load(h.im.data() + at);
    }
  }
  HWY_INLINE void step(FloatVec x) {
    for (std::int64_t k = 0; k < K; ++k) {
      const auto driven = hn::NegMulAdd(q_im[k], im[k], hn::Mul(p[k], x));
      const auto turned = hn::Mul(q_im[k], re[k]);
      re[k] = hn::MulAdd(q_re[k], re[k], driven);
      im[k] = hn::MulAdd(q_re[k], im[k], turned);
    }
  }
  HWY_INLINE void save(State& h, std::int64_t n) const {
    for (std::int64_t k = 0; k < K; ++k) {
      hn::StoreU(re[k], kFloat, h.re.data() + (n + k) * kLanes);
      hn::StoreU(im[k], kFloat, h.im.data() + (n + k) * kLanes);
    }
  }
};

// y [steps] += Re(sum eta h) over components n .. n+kForward-1.
HWY_INLINE void forward_components(const Tile& tile, std::int64_t n, std::int64_t steps, const float* x,
                                   float* y, State& h) {
  Recurrence<kForward> r(tile, h, n);
  FloatVec eta_re[kForward], eta_im[kForward];
  for (std::int64_t k = 0; k < kForward; ++k) {
    eta_re[k] = load(tile.eta_re.data() + (n + k) * kLanes);
    eta_im[k] = load(tile.eta_im.data() + (n + k) * kLanes);
  }
  for (std::int64_t t = 0; t < steps; ++t) {
    r.step(load(x + t * kLanes));
    auto sum = load(y + t * kLanes);
    for (std::int64_t k = 0; k < kForward; ++k) {
      sum = hn::MulAdd(eta_re[k], r.re[k], sum);
      sum = hn::NegMulAdd(eta_im[k], r.im[k], sum);
    }
    store(sum, y + t * kLanes);
  }
  r.save(h, n);
}

template <class T>
void forward_tile(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, T* y, float* h_last,
                  std::int64_t b, std::int64_t first) {
  const Tile tile(s, c, first);
  State h(s.N);
  h.load(c.h0, tile, s, b);
  HWY_ALIGN float x_block[kBlock * kLanes], y_block[kBlock * kLanes];
  const auto omega = load(tile.omega.data());
  for (std::int64_t begin = 0; begin < s.L; begin += kBlock) {
    const std::int64_t steps = std::min(kBlock, s.L - begin), offset = (b * s.L + begin) * s.D + first;
    load_block(x + offset, steps, s.D, tile.width, x_block);
    for (std::int64_t t = 0; t < steps; ++t)
      store(hn::Mul(omega, load(x_block + t * kLanes)), y_block + t * kLanes);
    for (std::int64_t n = 0; n < s.N; n += kForward) forward_components(tile, n, steps, x_block, y_block, h);
    store_block(y_block, steps, s.D, tile.width, y + offset);
  }
  h.store(h_last, tile, s, b);
}

// Gradients of a tile's coefficients, summed over steps and batch; float64, since the terms are many.
struct Sums {
  std::vector<double> p, q_re, q_im, eta_re, eta_im, omega;
  explicit Sums(std::int64_t N) : omega(static_cast<std::size_t>(kLanes)) {
    for (auto* v : {&p, &q_re, &q_im, &eta_re, &eta_im})
      v->assign(static_cast<std::size_t>(padded(N) * kLanes), 0.0);
  }
  static void add(FloatVec v, double* sums) {
    HWY_ALIGN float values[kLanes];
    store(v, values);
    for (std::int64_t i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(values[i]);
  }
  void store_to(const cpu::CemaGradients& g, const Tile& tile, const cpu::CemaShape& s) const {
    for (std::int64_t d = 0; d < tile.width; ++d) {
      g.omega[tile.first + d] = static_cast<float>(omega[static_cast<std::size_t>(d)]);
      for (std::int64_t n = 0; n < s.N; ++n) {
        const auto from = static_cast<std::size_t>(n * kLanes + d);
        const std::int64_t to = (tile.first + d) * s.N + n;
        g.p[to] = static_cast<float>(p[from]);
        g.q[2 * to] = static_cast<float>(q_re[from]);
        g.q[2 * to + 1] = static_cast<float>(q_im[from]);
        g.eta[2 * to] = static_cast<float>(eta_re[from]);
        g.eta[2 * to + 1] = static_cast<float>(eta_im[from]);
      }
    }
  }
};

// One block backwards for components n .. n+kBackward-1. h: the states before the block; G: in, dL/dh after
// its last step without that step's own dy; out, the same for the block before. dx gathers p Re(G).
HWY_INLINE void backward_components(const Tile& tile, std::int64_t n, std::int64_t steps, const float* x,
                                    const float* dy, float* dx, const State& h, State& G, Sums& sums,
                                    float* states) {
  constexpr std::int64_t K = kBackward;
  Recurrence<K> r(tile, h, n);
  const auto keep = [&](std::int64_t t) {
    for (std::int64_t k = 0; k < K; ++k) {
      store(r.re[k], states + ((t * K + k) * 2) * kLanes);
      store(r.im[k], states + ((t * K + k) * 2 + 1) * kLanes);
    }
  };
  keep(0);  // states[t]: before step t
  for (std::int64_t t = 0; t < steps; ++t) {
    r.step(load(x + t * kLanes));
    keep(t + 1);
  }
  FloatVec eta_re[K], eta_im[K], g_re[K], g_im[K], dp[K], dq_re[K], dq_im[K], deta_re[K], deta_im[K];
  for (std::int64_t k = 0; k < K; ++k) {
    const std::int64_t at = (n + k) * kLanes;
    eta_re[k] = load(tile.eta_re.data() + at);
    eta_im[k] = load(tile.eta_im.data() + at);
    g_re[k] = load(G.re.data() + at);
    g_im[k] = load(G.im.data() + at);
    dp[k] = dq_re[k] = dq_im[k] = deta_re[k] = deta_im[k] = hn::Zero(kFloat);
  }
  for (std::int64_t t = steps - 1; t >= 0; --t) {
    const auto x_t = load(x + t * kLanes), dy_t = load(dy + t * kLanes);
    auto dx_t = load(dx + t * kLanes);
    for (std::int64_t k = 0; k < K; ++k) {
      const float* before = states + ((t * K + k) * 2) * kLanes;
      const float* after = before + 2 * K * kLanes;
      g_re[k] = hn::MulAdd(eta_re[k], dy_t, g_re[k]);
      g_im[k] = hn::NegMulAdd(eta_im[k], dy_t, g_im[k]);
      deta_re[k] = hn::MulAdd(dy_t, load(after), deta_re[k]);
      deta_im[k] = hn::NegMulAdd(dy_t, load(after + kLanes), deta_im[k]);
      dx_t = hn::MulAdd(r.p[k], g_re[k], dx_t);
      dp[k] = hn::MulAdd(g_re[k], x_t, dp[k]);
      const auto h_re = load(before), h_im = load(before + kLanes);
      dq_re[k] = hn::MulAdd(g_re[k], h_re, hn::MulAdd(g_im[k], h_im, dq_re[k]));
      dq_im[k] = hn::MulAdd(g_im[k], h_re, hn::NegMulAdd(g_re[k], h_im, dq_im[k]));
      const auto re = hn::MulAdd(r.q_re[k], g_re[k], hn::Mul(r.q_im[k], g_im[k]));
      g_im[k] = hn::NegMulAdd(r.q_im[k], g_re[k], hn::Mul(r.q_re[k], g_im[k]));
      g_re[k] = re;
    }
    store(dx_t, dx + t * kLanes);
  }
  for (std::int64_t k = 0; k < K; ++k) {
    const std::int64_t at = (n + k) * kLanes;
    store(g_re[k], G.re.data() + at);
    store(g_im[k], G.im.data() + at);
    Sums::add(dp[k], sums.p.data() + at);
    Sums::add(dq_re[k], sums.q_re.data() + at);
    Sums::add(dq_im[k], sums.q_im.data() + at);
    Sums::add(deta_re[k], sums.eta_re.data() + at);
    Sums::add(deta_im[k], sums.eta_im.data() + at);
  }
}

// The states at the start of every block.
template <class T>
std::vector<State> border_states(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const Tile& tile,
                                 const T* x, std::int64_t b) {
  std::vector<State> borders;
  State h(s.N);
  h.load(c.h0, tile, s, b);
  HWY_ALIGN float x_block[kBlock * kLanes];
  for (std::int64_t begin = 0; begin < s.L; begin += kBlock) {
    borders.push_back(h);
    if (begin + kBlock >= s.L) break;
    load_block(x + (b * s.L + begin) * s.D + tile.first, kBlock, s.D, tile.width, x_block);
    for (std::int64_t n = 0; n < s.N; n += kForward) {
      Recurrence<kForward> r(tile, h, n);
      for (std::int64_t t = 0; t < kBlock; ++t) r.step(load(x_block + t * kLanes));
      r.save(h, n);
    }
  }
  return borders;
}

template <class T>
void backward_tile(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, const T* dy,
                   const float* dh_last, T* dx, const cpu::CemaGradients& gradients, std::int64_t first) {
  const Tile tile(s, c, first);
  const auto omega = load(tile.omega.data());
  Sums sums(s.N);
  State G(s.N);
  HWY_ALIGN float x_block[kBlock * kLanes], dy_block[kBlock * kLanes], dx_block[kBlock * kLanes];
  HWY_ALIGN float states[(kBlock + 1) * kBackward * 2 * kLanes];
  for (std::int64_t b = 0; b < s.B; ++b) {
    const auto borders = border_states(s, c, tile, x, b);
    G.load(dh_last, tile, s, b);
    for (auto block = static_cast<std::int64_t>(borders.size()) - 1; block >= 0; --block) {
      const std::int64_t begin = block * kBlock, steps = std::min(kBlock, s.L - begin);
      const std::int64_t offset = (b * s.L + begin) * s.D + first;
      load_block(x + offset, steps, s.D, tile.width, x_block);
      load_block(dy + offset, steps, s.D, tile.width, dy_block);
      auto domega = hn::Zero(kFloat);
      for (std::int64_t t = 0; t < steps; ++t) {
        const auto dy_t = load(dy_block + t * kLanes);
        domega = hn::MulAdd(dy_t, load(x_block + t * kLanes), domega);
        store(hn::Mul(omega, dy_t), dx_block + t * kLanes);
      }
      Sums::add(domega, sums.omega.data());
      const auto& h = borders[static_cast<std::size_t>(block)];
      for (std::int64_t n = 0; n < s.N; n += kBackward) {
        backward_components(tile, n, steps, x_block, dy_block, dx_block, h, G, sums, states);
      }
      store_block(dx_block, steps, s.D, tile.width, dx + offset);
    }
    if (gradients.h0 != nullptr) G.store(gradients.h0, tile, s, b);
  }
  sums.store_to(gradients, tile, s);
}

template <class T>
void forward(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, T* y, float* h_last) {
  const std::int64_t tiles = (s.D + kLanes - 1) / kLanes;
  parallel_for(s.B * tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      forward_tile(s, c, x, y, h_last, i / tiles, i % tiles * kLanes);
  });
}

// Parallel over tiles alone: a tile's gradients are summed over the batch in order.
template <class T>
void backward(const cpu::CemaShape& s, const cpu::CemaCoefficients& c, const T* x, const T* dy,
              const float* dh_last, T* dx, const cpu::CemaGradients& gradients) {
  const std::int64_t tiles = (s.D + kLanes - 1) / kLanes;
  parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) backward_tile(s, c, x, dy, dh_last, dx, gradients, i * kLanes);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

template <class T>
void cema_forward(const CemaShape& shape, const CemaCoefficients& c, const T* x, T* y, float* h_last) {
  MEGALODON_DISPATCH(forward<T>)(shape, c, x, y, h_last);
}
template <class T>
void cema_backward(const CemaShape& shape, const CemaCoefficients& c, const T* x, const T* dy,
                   const float* dh_last, T* dx, const CemaGradients& gradients) {
  MEGALODON_DISPATCH(backward<T>)(shape, c, x, dy, dh_last, dx, gradients);
}

template void cema_forward(const CemaShape&, const CemaCoefficients&, const float*, float*, float*);
template void cema_forward(const CemaShape&, const CemaCoefficients&, const Bfloat16*, Bfloat16*, float*);
template void cema_backward(const CemaShape&, const CemaCoefficients&, const float*, const float*,
                            const float*, float*, const CemaGradients&);
template void cema_backward(const CemaShape&, const CemaCoefficients&, const Bfloat16*, const Bfloat16*,
                            const float*, Bfloat16*, const CemaGradients&);

}  // namespace megalodon::ops::cpu
#endif
