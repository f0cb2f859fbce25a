#include <ATen/ATen.h>

#include "ops/cema/cema.h"

namespace megalodon::ops {

CemaResult cema_reference(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                          const at::Tensor& eta, const at::Tensor& omega,
                          const std::optional<at::Tensor>& h0) {
  auto h =
      h0 ? *h0 : at::zeros({x.size(0), x.size(2), p.size(1)}, q.options().requires_grad(false));  // [B, D, N]
  std::vector<at::Tensor> y;
  for (const auto& step : x.unbind(1)) {
    const auto x_t = step.to(p.scalar_type());             // [B, D]
    h = q * h + p * x_t.unsqueeze(-1);                     // [B, D, N]
    y.push_back(at::real(eta * h).sum(-1) + omega * x_t);  // [B, D]
  }
  return {at::stack(y, 1).to(x.scalar_type()), h};
}

}  // namespace megalodon::ops
