#include "ops/cema/cema.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/cema/kernel.h"
#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

void check(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q, const at::Tensor& eta,
           const at::Tensor& omega, const Optional& h0) {
  check_activation("cema", "x", x, 3);
  TORCH_CHECK(x.numel() > 0, "[cema] x: expected at least one sequence, step and feature, got shape ",
              x.sizes());
  const int64_t B = x.size(0), D = x.size(2);
  const auto real = statistics_type(x), complex = at::toComplexType(real);
  check_shape("cema", "p", p, {D, -1});
  const int64_t N = p.size(1);
  TORCH_CHECK(N >= 1, "[cema] p: expected at least one component a feature, got shape ", p.sizes());
  check_type("cema", "p", p, real);
  check_shape("cema", "q", q, {D, N});
  check_type("cema", "q", q, complex);
  check_shape("cema", "eta", eta, {D, N});
  check_type("cema", "eta", eta, complex);
  check_shape("cema", "omega", omega, {D});
  check_type("cema", "omega", omega, real);
  if (h0) {
    check_shape("cema", "h0", *h0, {B, D, N});
    check_type("cema", "h0", *h0, complex);
  }
  for (const auto& [name, tensor] :
       {std::pair{"p", p}, {"q", q}, {"eta", eta}, {"omega", omega}, {"h0", h0.value_or(x)}}) {
    TORCH_CHECK(tensor.device() == x.device(), "[cema] ", name, ": expected device ", x.device(), ", got ",
                tensor.device());
  }
}

// The CUDA kernels take as many components as any preset has, and twice that.
bool has_kernel(const at::Tensor& x, const at::Tensor& p) {
  return has_fast_kernel(x) && (x.is_cpu() || p.size(1) <= 32);
}

// Pairs of floats in memory, whatever lazy conjugation the tensor carries.
at::Tensor plain(const at::Tensor& x) {
  return x.resolve_conj().contiguous();
}

const float* floats(const at::Tensor& x) {
  return x.defined() ? static_cast<const float*>(x.const_data_ptr()) : nullptr;
}
float* mutable_floats(const at::Tensor& x) {
  return x.defined() ? static_cast<float*>(x.mutable_data_ptr()) : nullptr;
}

// Contiguous arguments, held while their pointers are used.
struct Arguments {
  at::Tensor x, p, q, eta, omega, h0;
  cpu::CemaShape shape;

  Arguments(const at::Tensor& x_in, const at::Tensor& p_in, const at::Tensor& q_in, const at::Tensor& eta_in,
            const at::Tensor& omega_in, const Optional& h0_in)
      : x(x_in.contiguous()),
        p(p_in.contiguous()),
        q(plain(q_in)),
        eta(plain(eta_in)),
        omega(omega_in.contiguous()),
        h0(h0_in ? plain(*h0_in) : at::Tensor()),
        shape{x.size(0), x.size(1), x.size(2), p.size(1)} {}
  cpu::CemaCoefficients coefficients() const {
    return {floats(p), floats(q), floats(eta), floats(omega), floats(h0)};
  }
};

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                                               const at::Tensor& eta, const at::Tensor& omega,
                                               const Optional& h0) {
  check(x, p, q, eta, omega, h0);
  if (!has_kernel(x, p)) {
    auto result = cema_reference(x, p, q, eta, omega, h0);
    return {result.y, result.h_last};
  }
  const Arguments a(x, p, q, eta, omega, h0);
  auto y = at::empty_like(a.x), h_last = at::empty({a.shape.B, a.shape.D, a.shape.N}, a.q.options());
  with_element_type(x, [&]<class T>(T*) {
    cpu::cema_forward(a.shape, a.coefficients(), pointer<T>(a.x), mutable_pointer<T>(y),
                      mutable_floats(h_last));
  });
  return {y, h_last};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients backward_cpu(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q, const at::Tensor& eta,
                       const at::Tensor& omega, const Optional& h0, const at::Tensor& dy,
                       const Optional& dh_last) {
  const Arguments a(x, p, q, eta, omega, h0);
  const auto dy_ = dy.contiguous(), dh_last_ = dh_last ? plain(*dh_last) : at::Tensor();
  auto dx = at::empty_like(a.x), dp = at::empty_like(a.p), dq = at::empty_like(a.q),
       deta = at::empty_like(a.eta);
  auto domega = at::empty_like(a.omega), dh0 = h0 ? at::empty_like(a.h0) : at::Tensor();
  const cpu::CemaGradients gradients{mutable_floats(dp), mutable_floats(dq), mutable_floats(deta),
                                     mutable_floats(domega), mutable_floats(dh0)};
  with_element_type(x, [&]<class T>(T*) {
    cpu::cema_backward(a.shape, a.coefficients(), pointer<T>(a.x), pointer<T>(dy_), floats(dh_last_),
                       mutable_pointer<T>(dx), gradients);
  });
  return {dx, dp, dq, deta, domega, dh0};
}

std::tuple<at::Tensor, at::Tensor> dispatch_forward(const at::Tensor& x, const at::Tensor& p,
                                                    const at::Tensor& q, const at::Tensor& eta,
                                                    const at::Tensor& omega, const Optional& h0) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::cema");
  return op.call(x, p, q, eta, omega, h0);
}

struct Cema : torch::autograd::Function<Cema> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& p,
                               const at::Tensor& q, const at::Tensor& eta, const at::Tensor& omega,
                               const Optional& h0) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, p, q, eta, omega, h0.value_or(at::Tensor())});
    ctx->set_materialize_grads(false);
    const auto [y, h_last] = dispatch_forward(x, p, q, eta, omega, h0);
    return {y, h_last};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::cema_backward");
    const auto saved = ctx->get_saved_variables();
    const auto given = [](const at::Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; };
    const auto dy = upstream[0].defined() ? upstream[0] : at::zeros_like(saved[0]);
    const auto [dx, dp, dq, deta, domega, dh0] =
        op.call(saved[0], saved[1], saved[2], saved[3], saved[4], given(saved[5]), dy, given(upstream[1]));
    return {dx, dp, dq, deta, domega, dh0};
  }
};

std::tuple<at::Tensor, at::Tensor> autograd(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                                            const at::Tensor& eta, const at::Tensor& omega,
                                            const Optional& h0) {
  check(x, p, q, eta, omega, h0);
  if (!has_kernel(x, p)) {
    auto result = cema_reference(x, p, q, eta, omega, h0);
    return {result.y, result.h_last};
  }
  const auto results = Cema::apply(x, p, q, eta, omega, h0);
  return {results[0], results[1]};
}

}  // namespace

CemaResult cema(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q, const at::Tensor& eta,
                const at::Tensor& omega, const Optional& h0) {
  auto [y, h_last] = dispatch_forward(x, p, q, eta, omega, h0);
  return {y, h_last};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "cema(Tensor x, Tensor p, Tensor q, Tensor eta, Tensor omega, Tensor? h0=None) -> (Tensor y, Tensor "
      "h_last)");
  m.def(
      "cema_backward(Tensor x, Tensor p, Tensor q, Tensor eta, Tensor omega, Tensor? h0, Tensor dy, Tensor? "
      "dh_last)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("cema", &forward_cpu);
  m.impl("cema_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("cema", &autograd);
}

}  // namespace megalodon::ops
