#include "ops/cross_entropy/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cross_entropy/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

// Highway's Exp makes 0 of NaN; a loss must not hide one.
HWY_INLINE FloatVec exp_of(FloatVec a) {
  return hn::IfThenElse(hn::IsNaN(a), a, hn::Exp(kFloat, a));
}

HWY_INLINE FloatVec max_of(FloatVec a, FloatVec b, Whole) {
  return hn::Max(a, b);
}
HWY_INLINE FloatVec max_of(FloatVec a, FloatVec b, Some part) {
  return hn::IfThenElse(hn::FirstN(kFloat, static_cast<std::size_t>(part.n)), hn::Max(a, b), a);
}

template <class E>
float value(const E* p) {
  return hn::GetLane(load_some(p, 1));
}

// With the target's logit apart, nll = log(1 + sum of the others' exp(logit - target's)) stays accurate where
// it is next to nothing. The sum goes along with the max so far, a block of logits at a time: a block is read
// twice in the nearest cache, the row once from memory.
template <class E>
void forward(const E* HWY_RESTRICT logits, std::int64_t target, std::int64_t V, float* HWY_RESTRICT nll) {
  constexpr std::int64_t kBlock = 1024;
  float max = std::numeric_limits<float>::lowest();
  auto others = hn::Zero(kFloat);
  for (std::int64_t begin = 0; begin < V; begin += kBlock) {
    const std::int64_t end = std::min(V, begin + kBlock);
    auto block_max = hn::Set(kFloat, max);
    for_vectors(end - begin, [&](std::int64_t i, auto part) HWY_ATTR {
      block_max = max_of(block_max, load(logits + begin + i, part), part);
    });
    const float new_max = hn::GetLane(hn::MaxOfLanes(kFloat, block_max));
    const auto shift = hn::Set(kFloat, new_max);
    others = hn::Mul(others, hn::Set(kFloat, std::exp(max - new_max)));
    const auto add = [&](std::int64_t from, std::int64_t to) HWY_ATTR {
      for_vectors(to - from, [&](std::int64_t i, auto part) HWY_ATTR {
        others = hn::Add(others, within(exp_of(hn::Sub(load(logits + from + i, part), shift)), part));
      });
    };
    add(begin, std::clamp(target, begin, end));
    add(std::clamp(target + 1, begin, end), end);
    max = new_max;
  }
  const float behind = max - value(logits + target), sum = sum_of_lanes(others);
  *nll = behind == 0 ? std::log1p(sum) : behind + std::log(sum + std::exp(-behind));
}

// d_logits = (softmax - onehot) d_nll; log(softmax) of the target is -nll.
template <class E>
void backward(const E* HWY_RESTRICT logits, std::int64_t target, std::int64_t V, float nll, float d_nll,
              E* HWY_RESTRICT d_logits) {
  const auto log_sum = hn::Set(kFloat, value(logits + target) + nll), scale = hn::Set(kFloat, d_nll);
  for_vectors(V, [&](std::int64_t i, auto part) HWY_ATTR {
    store(hn::Mul(exp_of(hn::Sub(load(logits + i, part), log_sum)), scale), d_logits + i, part);
  });
  store_some(hn::Set(kFloat, std::expm1(-nll) * d_nll), d_logits + target, 1);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {
namespace {
std::int64_t grain(std::int64_t V) {
  return std::max<std::int64_t>(1, (1 << 13) / V);
}
}  // namespace

template <class E>
void cross_entropy_forward(const E* logits, const std::int64_t* targets, std::int64_t ignored, std::int64_t T,
                           std::int64_t V, float* nll) {
  const auto kernel = MEGALODON_DISPATCH(forward<E>);
  parallel_for(T, grain(V), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      if (targets[t] == ignored) {
        nll[t] = 0;
      } else {
        kernel(logits + t * V, targets[t], V, nll + t);
      }
    }
  });
}

template <class E>
void cross_entropy_backward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                            const float* nll, const float* d_nll, std::int64_t T, std::int64_t V,
                            E* d_logits) {
  const auto kernel = MEGALODON_DISPATCH(backward<E>);
  parallel_for(T, grain(V), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      if (targets[t] == ignored) {
        std::fill_n(d_logits + t * V, V, E{});
      } else {
        kernel(logits + t * V, targets[t], V, nll[t], d_nll[t], d_logits + t * V);
      }
    }
  });
}

template void cross_entropy_forward(const float*, const std::int64_t*, std::int64_t, std::int64_t,
                                    std::int64_t, float*);
template void cross_entropy_forward(const Bfloat16*, const std::int64_t*, std::int64_t, std::int64_t,
                                    std::int64_t, float*);
template void cross_entropy_backward(const float*, const std::int64_t*, std::int64_t, const float*,
                                     const float*, std::int64_t, std::int64_t, float*);
template void cross_entropy_backward(const Bfloat16*, const std::int64_t*, std::int64_t, const float*,
                                     const float*, std::int64_t, std::int64_t, Bfloat16*);

}  // namespace megalodon::ops::cpu
#endif
