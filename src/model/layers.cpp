#include "model/layers.h"

#include <ATen/ATen.h>

#include "ops/dropout/dropout.h"

namespace megalodon::model {

at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const auto w = weight.to(x.scalar_type());
  return bias.defined() ? at::linear(x, w, bias.to(x.scalar_type())) : at::linear(x, w);
}

at::Tensor drop(const at::Tensor& x, double p, DropoutKeys* keys) {
  return keys != nullptr && p > 0 ? ops::dropout(x, p, keys->next()) : x;
}

at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, at::ScalarType type) {
  return at::embedding(table, tokens).to(type);
}

void store_in_ring(at::Tensor& ring, const at::Tensor& values, const at::Tensor& start) {
  const int64_t B = values.size(0), L = values.size(1), C = ring.size(1);
  const int64_t kept = std::min(L, C), first = L - kept;
  const auto row = at::arange(B, at::kLong).unsqueeze(1) * C;  // [B, 1]
  const auto slot =
      (start.unsqueeze(1) + at::arange(first, L, at::kLong).unsqueeze(0)).remainder(C);  // [B, kept]
  const auto index = (row + slot).view(-1).to(ring.device());
  const auto last = values.narrow(1, first, kept).to(ring.scalar_type());
  ring.view({B * C, -1}).index_copy_(0, index, last.reshape({B * kept, -1}));
}

}  // namespace megalodon::model
