#include "ops/attention_step/attention_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/attention_step/kernel.h"
#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Kernel = at::Tensor(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, int64_t chunk,
                          double rope_base, double eps, const at::Tensor& v, const at::Tensor& gate,
                          const at::Tensor& start, at::Tensor& ring_k, at::Tensor& ring_v);

void check(const at::Tensor& z, const QueryKeyParameters& p, const at::Tensor& v, const at::Tensor& gate,
           const at::Tensor& start, const AttentionCache& cache) {
  constexpr auto op = "attention_step";
  check_activation(op, "z", z, 4);
  const int64_t B = z.size(0), H = z.size(2), dz = z.size(3);
  check_shape(op, "z", z, {B, 1, H, dz});
  check_shape(op, "gamma", p.gamma, {2, H * dz});
  check_shape(op, "beta", p.beta, {2, H * dz});
  check_type(op, "gamma", p.gamma, statistics_type(z));
  check_type(op, "beta", p.beta, statistics_type(z));
  check_shape(op, "v", v, {B, 1, H, -1});
  const int64_t dv = v.size(3);
  check_shape(op, "gate", gate, {B, 1, H * dv});
  check_shape(op, "start", start, {B});
  check_type(op, "start", start, at::kLong);
  check_shape(op, "cache.k", cache.k, {B, -1, H, dz});
  const int64_t C = cache.k.size(1);
  check_shape(op, "cache.v", cache.v, {B, C, H, dv});
  TORCH_CHECK(p.chunk >= 1 && p.chunk <= C, "[attention_step] chunk: expected 1 to the cache's ", C,
              " slots, got ", p.chunk);
  for (const auto& [name, t] :
       {std::pair{"v", v}, {"gate", gate}, {"cache.k", cache.k}, {"cache.v", cache.v}}) {
    check_type(op, name, t, z.scalar_type());
    TORCH_CHECK(t.is_contiguous(), "[attention_step] ", name, ": expected a contiguous tensor");
  }
}

bool has_kernel(const at::Tensor& z, const at::Tensor& v) {
  const int64_t pack = 16 / z.element_size();
  return !at::GradMode::is_enabled() && z.is_cuda() && has_fast_kernel(z) && z.size(3) % pack == 0 &&
         v.size(3) % pack == 0 && z.size(3) <= kMostStepFeatures;
}

}  // namespace

at::Tensor attention_step(const at::Tensor& z, const QueryKeyParameters& p, const at::Tensor& v,
                          const at::Tensor& gate, const at::Tensor& start, const AttentionCache& cache) {
  static const auto op = registered<Kernel>("megalodon::attention_step");
  check(z, p, v, gate, start, cache);
  if (!has_kernel(z, v)) return attention_step_reference(z, p, v, gate, start, cache);
  auto ring_k = cache.k, ring_v = cache.v;
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(z, p.gamma, p.beta, p.chunk, p.rope_base, p.eps, v, gate, start, ring_k, ring_v);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "attention_step(Tensor z, Tensor gamma, Tensor beta, int chunk, float rope_base, float eps, Tensor v, "
      "Tensor gate, Tensor start, Tensor(a!) ring_k, Tensor(b!) ring_v) -> Tensor");
}

}  // namespace megalodon::ops
