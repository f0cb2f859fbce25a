#include "ops/cema/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Complex tensors are pairs of floats to the kernels.
const float* floats(const at::Tensor& x) {
  return pointer<float>(x);
}
at::Tensor plain(const at::Tensor& x) {
  return x.resolve_conj().contiguous();
}

// Contiguous arguments, held while their pointers are used.
struct Arguments {
  at::Tensor x, p, q, eta, omega, h0;
  cuda::CemaShape shape;
  cuda::CemaCut cut;

  Arguments(const at::Tensor& x_in, const at::Tensor& p_in, const at::Tensor& q_in, const at::Tensor& eta_in,
            const at::Tensor& omega_in, const Optional& h0_in)
      : x(x_in.contiguous()),
        p(p_in.contiguous()),
        q(plain(q_in)),
        eta(plain(eta_in)),
        omega(omega_in.contiguous()),
        h0(h0_in ? plain(*h0_in) : at::Tensor()),
        shape{x.size(0), x.size(1), x.size(2), p.size(1)},
        cut(cuda::cema_cut(shape)) {
    TORCH_CHECK(shape.N <= cuda::kMostCemaComponents, "[cema] p: expected at most ",
                cuda::kMostCemaComponents, " components a feature on a CUDA device, got ", shape.N);
  }
  cuda::CemaCoefficients coefficients() const {
    return {floats(p), floats(q), floats(eta), floats(omega), floats(h0)};
  }
  at::Tensor states(int64_t count) const {
    return at::empty({shape.B, count, shape.D, shape.N, 2}, p.options());
  }
};

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                                           const at::Tensor& eta, const at::Tensor& omega,
                                           const Optional& h0) {
  const Arguments a(x, p, q, eta, omega, h0);
  const auto y = at::empty_like(a.x), h_last = at::empty({a.shape.B, a.shape.D, a.shape.N}, a.q.options());
  const auto segment_state = a.states(a.cut.segments);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::cema_forward(a.shape, a.coefficients(), pointer<T>(a.x), mutable_pointer<float>(segment_state),
                       mutable_pointer<T>(y), mutable_pointer<float>(h_last), stream);
  });
  return {y, h_last};
}

Gradients backward(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q, const at::Tensor& eta,
                   const at::Tensor& omega, const Optional& h0, const at::Tensor& dy,
                   const Optional& dh_last) {
  const Arguments a(x, p, q, eta, omega, h0);
  const auto [B, L, D, N] = a.shape;
  const auto dy_ = dy.contiguous(), dh_last_ = dh_last ? plain(*dh_last) : at::Tensor();
  const auto dx = at::empty_like(a.x), dh0 = h0 ? at::empty_like(a.h0) : at::Tensor();
  const auto segment_state = a.states(a.cut.segments), span_state = a.states(a.cut.spans);
  const auto sums = at::empty({5 * N + 1, B * a.cut.segments, D}, a.p.options());
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::cema_backward(a.shape, a.coefficients(), pointer<T>(a.x), pointer<T>(dy_), floats(dh_last_),
                        {mutable_pointer<float>(segment_state), mutable_pointer<float>(span_state),
                         mutable_pointer<float>(sums)},
                        mutable_pointer<T>(dx), mutable_pointer<float>(dh0), stream);
  });
  const auto total = sums.sum(1, false, at::kDouble).to(at::kFloat).t();  // [D, 5 N + 1]
  const auto real = [&, n = N](int64_t first) { return total.narrow(1, first, n).contiguous(); };
  const auto complex = [&, d = D, n = N](int64_t first) {
    return at::view_as_complex(
        total.narrow(1, first, 2 * n).clone(at::MemoryFormat::Contiguous).view({d, n, 2}));
  };
  return {dx, real(0), complex(N), complex(3 * N), total.select(1, 5 * N).contiguous(), dh0};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cema", &forward);
  m.impl("cema_backward", &backward);
}

}  // namespace megalodon::ops
