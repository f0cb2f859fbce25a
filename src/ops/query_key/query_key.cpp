#include "ops/query_key/query_key.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Pair = std::tuple<at::Tensor, at::Tensor>;

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

Pair forward(const at::Tensor& z, const at::Tensor& gamma, const at::Tensor& beta, const at::Tensor& start,
             int64_t chunk, double rope_base, double eps) {
  check(z, gamma, beta, start, chunk, rope_base);
  return query_key_reference(z, gamma, beta, start, chunk, rope_base, eps);
}

}  // namespace

std::pair<at::Tensor, at::Tensor> query_key(const at::Tensor& z, const at::Tensor& gamma,
                                            const at::Tensor& beta, const at::Tensor& start, int64_t chunk,
                                            double rope_base, double eps) {
  static const auto op = registered<decltype(forward)>("megalodon::query_key");
  auto [q, k] = op.call(z, gamma, beta, start, chunk, rope_base, eps);
  return {q, k};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "query_key(Tensor z, Tensor gamma, Tensor beta, Tensor start, int chunk, float rope_base, "
      "float eps=1e-05) -> (Tensor q, Tensor k)");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("query_key", &forward);
}

}  // namespace megalodon::ops
