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

// Contiguous arguments, held while their pointers are used. The steps before `first` go to the tensor cores.
struct Arguments {
  at::Tensor x, p, q, eta, omega, h0;
  cuda::CemaShape shape;
  int64_t first = 0;

  Arguments(const at::Tensor& x_in, const at::Tensor& p_in, const at::Tensor& q_in, const at::Tensor& eta_in,
            const at::Tensor& omega_in, const Optional& h0_in)
      : x(aligned(x_in, 16 / x_in.element_size())),
        p(p_in.contiguous()),
        q(plain(q_in)),
        eta(plain(eta_in)),
        omega(omega_in.contiguous()),
        h0(h0_in ? plain(*h0_in) : at::Tensor()),
        shape{x.size(0), x.size(1), x.size(2), p.size(1)} {
    TORCH_CHECK(shape.N <= cuda::kMostCemaComponents, "[cema] p: expected at most ",
                cuda::kMostCemaComponents, " components a feature on a CUDA device, got ", shape.N);
    if (x.scalar_type() == at::kBFloat16 && shape.N <= cuda::kMostBlockComponents &&
        shape.D % cuda::kCemaTileFeatures == 0 && cuda::has_cema_blocks())
      first = shape.L / cuda::kCemaTile * cuda::kCemaTile;
  }
  bool has_tiles() const { return first > 0; }
  bool has_rest() const { return first < shape.L; }
  // With the state before `first` as h0 where that is given.
  cuda::CemaCoefficients coefficients(const at::Tensor& at_first = {}) const {
    return {floats(p), floats(q), floats(eta), floats(omega), floats(at_first.defined() ? at_first : h0)};
  }
  at::Tensor states(int64_t count) const {
    return at::empty({shape.B, count, shape.D, shape.N, 2}, p.options());
  }
};

// The state after the tiles; y, where it is wanted, up to there.
at::Tensor forward_tiles(const Arguments& a, const at::Tensor& y) {
  const auto state = a.states(1);
  launch(a.x, [&](cudaStream_t stream) {
    cuda::cema_blocks(a.shape, a.coefficients(), pointer<Bfloat16>(a.x), mutable_pointer<Bfloat16>(y),
                      mutable_pointer<float>(state), stream);
  });
  return state;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                                           const at::Tensor& eta, const at::Tensor& omega,
                                           const Optional& h0) {
  const Arguments a(x, p, q, eta, omega, h0);
  const auto y = at::empty_like(a.x);
  const auto at_first = a.has_tiles() ? forward_tiles(a, y) : at::Tensor();
  const auto as_state = [&](const at::Tensor& h) {
    return at::view_as_complex(h.view({a.shape.B, a.shape.D, a.shape.N, 2}));
  };
  if (!a.has_rest()) return {y, as_state(at_first)};
  const auto h_last = a.states(1), segment_state = a.states(cuda::cema_cut(a.shape, a.first).segments);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::cema_forward(a.shape, a.first, a.coefficients(at_first), pointer<T>(a.x),
                       mutable_pointer<float>(segment_state), mutable_pointer<T>(y),
                       mutable_pointer<float>(h_last), stream);
  });
  return {y, as_state(h_last)};
}

Gradients backward(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q, const at::Tensor& eta,
                   const at::Tensor& omega, const Optional& h0, const at::Tensor& dy,
                   const Optional& dh_last) {
  const Arguments a(x, p, q, eta, omega, h0);
  const auto [B, L, D, N] = a.shape;
  const auto dy_ = aligned(dy, 16 / dy.element_size()), dx = at::empty_like(a.x);
  const auto cut = a.has_rest() ? cuda::cema_cut(a.shape, a.first) : cuda::CemaCut{0, 0};
  const int64_t tile_rows = a.has_tiles() ? cuda::cema_block_groups(a.shape) : 0,
                rows = tile_rows + B * cut.segments;
  const auto sums = at::empty({rows, (5 * N + 1) * D}, a.p.options());
  const auto sums_from = [&, apart = sums.size(1), of_complex = 2 * D * N](int64_t row) {
    float* const q = mutable_pointer<float>(sums) + row * apart;
    return cuda::CemaSums{q, q + of_complex, q + 2 * of_complex, q + apart - a.shape.D, apart};
  };
  auto dh0 = a.states(1);
  auto after =
      dh_last ? plain(*dh_last) : at::Tensor();  // the gradient of the state after what is left to do
  if (a.has_rest()) {
    const auto at_first = a.has_tiles() ? forward_tiles(a, {}) : at::Tensor();
    const auto segment_state = a.states(cut.segments), span_state = a.states(cut.spans);
    launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
      cuda::cema_backward(
          a.shape, a.first, a.coefficients(at_first), pointer<T>(a.x), pointer<T>(dy_), floats(after),
          {mutable_pointer<float>(segment_state), mutable_pointer<float>(span_state), sums_from(tile_rows)},
          mutable_pointer<T>(dx), mutable_pointer<float>(dh0), stream);
    });
    after = dh0;
  }
  if (a.has_tiles()) {
    const auto before = a.states(1);
    launch(x, [&](cudaStream_t stream) {
      cuda::cema_blocks_backward(a.shape, a.coefficients(), pointer<Bfloat16>(a.x), pointer<Bfloat16>(dy_),
                                 floats(after), mutable_pointer<Bfloat16>(dx), mutable_pointer<float>(before),
                                 sums_from(0), stream);
    });
    dh0 = before;
  }
  const auto total = rows == 1 ? sums[0] : sum_of_blocks(sums);
  const auto complex = [&, d = D, n = N](int64_t which) {
    return at::view_as_complex(total.narrow(0, which * 2 * d * n, 2 * d * n).view({d, n, 2}));
  };
  return {dx,
          total.narrow(0, 4 * D * N, D * N).view({D, N}),
          complex(0),
          complex(1),
          total.narrow(0, 5 * D * N, D),
          h0 ? at::view_as_complex(dh0.view({B, D, N, 2})) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cema", &forward);
  m.impl("cema_backward", &backward);
}

}  // namespace megalodon::ops
