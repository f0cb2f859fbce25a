#include "ops/attention_step/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "ops/cuda_launch.h"
#include "ops/step_program/cuda.h"

namespace megalodon::ops {
namespace {

at::Tensor step(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, int64_t chunk,
                double rope_base, double eps, const at::Tensor& v, const at::Tensor& gate,
                const at::Tensor& start, at::Tensor& ring_k, at::Tensor& ring_v) {
  const auto z_ = z.contiguous(), gamma_ = gamma.contiguous(), beta_ = beta.contiguous();
  const int64_t pack = 16 / v.element_size();
  const auto v_ = aligned(v, pack), gate_ = aligned(gate, pack), start_ = start.contiguous();
  const auto o = at::empty_like(gate);
  launch_typed(z, [&]<class T>(T*, cudaStream_t stream) {
    const cuda::AttentionStep<T> call{.B = z.size(0),
                                      .H = z.size(2),
                                      .dz = z.size(3),
                                      .dv = v.size(3),
                                      .C = ring_k.size(1),
                                      .chunk = chunk,
                                      .log2_base = std::log2(rope_base),
                                      .eps = static_cast<float>(eps),
                                      .z = pointer<T>(z_),
                                      .v = pointer<T>(v_),
                                      .gate = pointer<T>(gate_),
                                      .gamma = pointer<float>(gamma_),
                                      .beta = pointer<float>(beta_),
                                      .start = pointer<int64_t>(start_),
                                      .ring_k = mutable_pointer<T>(ring_k),
                                      .ring_v = mutable_pointer<T>(ring_v),
                                      .o = mutable_pointer<T>(o)};
    cuda::attention_step(call, stream);
    if constexpr (std::is_same_v<T, Bfloat16>) cuda::note_call(call, stream);
  });
  return o;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("attention_step", &step);
}

}  // namespace megalodon::ops
