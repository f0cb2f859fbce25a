#include "ops/query_key/query_key.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/column_sums.h"
#include "ops/query_key/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& start,
           int64_t chunk, double rope_base) {
  check_activation("query_key", "z", z, 4);
  const int64_t Z = z.size(2) * z.size(3);
  TORCH_CHECK(z.size(3) > 0 && z.size(3) % 2 == 0,
              "[query_key] z: expected an even number of features in a head, got ", z.size(3));
  check_type("query_key", "gamma", gamma, statistics_type(z));
  check_type("query_key", "beta", beta, statistics_type(z));
  check_shape("query_key", "gamma", gamma, {2, Z});
  check_shape("query_key", "beta", beta, {2, Z});
  check_type("query_key", "start", start, at::kLong);
  check_shape("query_key", "start", start, {z.size(0)});
  TORCH_CHECK(chunk >= 0, "[query_key] chunk: expected at least 0, got ", chunk);
  TORCH_CHECK(rope_base > 0, "[query_key] rope_base: expected a positive number, got ", rope_base);
}

Pair forward_cpu(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta,
                 const at::Tensor& start, int64_t chunk, double rope_base, double eps) {
  check(z, gamma, beta, start, chunk, rope_base);
  if (!has_fast_kernel(z)) return query_key_reference(z, gamma, beta, start, chunk, rope_base, eps);
  const auto z_ = z.contiguous(), gamma_ = gamma.contiguous(), beta_ = beta.contiguous();
  const auto start_ = start.contiguous(), q = at::empty_like(z_), k = at::empty_like(z_);
  const cpu::QueryKeySizes sizes{z.size(0), z.size(1), z.size(2), z.size(3), eps};
  const cpu::Rotations rotations(pointer<int64_t>(start_), sizes.B, sizes.L, chunk, rope_base, sizes.dz);
  with_element_type(z, [&]<class T>(T*) {
    cpu::query_key_forward(sizes, pointer<T>(z_), pointer<float>(gamma_), pointer<float>(beta_), rotations,
                           mutable_pointer<T>(q), mutable_pointer<T>(k));
  });
  return {q, k};
}

Triple backward_cpu(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& start, int64_t chunk,
                    double rope_base, double eps, const at::Tensor& dq, const at::Tensor& dk) {
  const auto z_ = z.contiguous(), gamma_ = gamma.contiguous(), start_ = start.contiguous();
  const auto dq_ = dq.contiguous(), dk_ = dk.contiguous(), d_z = at::empty_like(z_);
  const cpu::QueryKeySizes sizes{z.size(0), z.size(1), z.size(2), z.size(3), eps};
  const auto sums = at::empty({row_block_count(sizes.B * sizes.L), 2, 2, sizes.H * sizes.dz},
                              z.options().dtype(at::kDouble));
  const cpu::Rotations rotations(pointer<int64_t>(start_), sizes.B, sizes.L, chunk, rope_base, sizes.dz);
  with_element_type(z, [&]<class T>(T*) {
    cpu::query_key_backward(sizes, pointer<T>(z_), pointer<float>(gamma_), rotations, pointer<T>(dq_),
                            pointer<T>(dk_), mutable_pointer<T>(d_z), mutable_pointer<double>(sums));
  });
  const auto d_parameters = sums.sum(0).to(at::kFloat);
  return {d_z, d_parameters[0], d_parameters[1]};
}

Pair dispatch(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& start,
              int64_t chunk, double rope_base, double eps) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::query_key");
  return op.call(z, gamma, beta, start, chunk, rope_base, eps);
}

struct QueryKey : torch::autograd::Function<QueryKey> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& z, const at::Tensor& gamma,
                               const at::Tensor& beta, const at::Tensor& start, int64_t chunk,
                               double rope_base, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({z, gamma, start});
    ctx->saved_data["chunk"] = chunk;
    ctx->saved_data["rope_base"] = rope_base;
    ctx->saved_data["eps"] = eps;
    const auto [q, k] = dispatch(z, gamma, beta, start, chunk, rope_base, eps);
    return {q, k};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::query_key_backward");
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto [d_z, d_gamma, d_beta] =
        op.call(saved[0], saved[1], saved[2], data["chunk"].toInt(), data["rope_base"].toDouble(),
                data["eps"].toDouble(), dy[0], dy[1]);
    return {d_z, d_gamma, d_beta, {}, {}, {}, {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
Pair autograd(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& start,
              int64_t chunk, double rope_base, double eps) {
  check(z, gamma, beta, start, chunk, rope_base);
  if (!has_fast_kernel(z)) return query_key_reference(z, gamma, beta, start, chunk, rope_base, eps);
  const auto qk = QueryKey::apply(z, gamma, beta, start, chunk, rope_base, eps);
  return {qk[0], qk[1]};
}

}  // namespace

std::pair<at::Tensor, at::Tensor> query_key(const at::Tensor& z, const at::Tensor& gamma,
                                            const at::Tensor& beta, const at::Tensor& start, int64_t chunk,
                                            double rope_base, double eps) {
  auto [q, k] = dispatch(z, gamma, beta, start, chunk, rope_base, eps);
  return {q, k};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "query_key(Tensor z, Tensor gamma, Tensor beta, Tensor start, int chunk, float rope_base, "
      "float eps=1e-05) -> (Tensor q, Tensor k)");
  m.def(
      "query_key_backward(Tensor z, Tensor gamma, Tensor start, int chunk, float rope_base, float eps, "
      "Tensor dq, Tensor dk) -> (Tensor dz, Tensor d_gamma, Tensor d_beta)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("query_key", &forward_cpu);
  m.impl("query_key_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("query_key", &autograd);
}

}  // namespace megalodon::ops
