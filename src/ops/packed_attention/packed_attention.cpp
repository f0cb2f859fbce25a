#include "ops/packed_attention/packed_attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/attention/kernel.h"
#include "ops/check.h"
#include "ops/device.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr auto kOp = "packed_attention";

void check_borders(const at::Tensor& borders, int64_t longest, int64_t T) {
  const auto on_cpu = borders.contiguous();
  const auto* border = on_cpu.const_data_ptr<int32_t>();
  const int64_t S = on_cpu.numel() - 1;
  TORCH_CHECK(border[0] == 0 && border[S] == T, "[packed_attention] borders: expected them to go from 0 to ",
              T, ", got ", border[0], " to ", border[S]);
  for (int64_t i = 0; i < S; ++i) {
    const int64_t length = int64_t{border[i + 1]} - border[i];
    TORCH_CHECK(length >= 0 && length <= longest, "[packed_attention] borders: sequence ", i,
                ": expected 0 to ", longest, " rows, got ", length);
  }
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& borders,
           int64_t longest) {
  check_activation(kOp, "q", q, 3);
  const int64_t T = q.size(0), H = q.size(1);
  check_type(kOp, "k", k, q.scalar_type());
  check_type(kOp, "v", v, q.scalar_type());
  check_shape(kOp, "k", k, {T, -1, q.size(2)});
  const int64_t Hkv = k.size(1);
  TORCH_CHECK(Hkv > 0 && H % Hkv == 0,
              "[packed_attention] k: expected a number of heads that divides those of q, got ", Hkv, " and ",
              H);
  check_shape(kOp, "v", v, {T, Hkv, -1});
  check_type(kOp, "borders", borders, at::kInt);
  check_shape(kOp, "borders", borders, {-1});
  TORCH_CHECK(borders.numel() > 0, "[packed_attention] borders: expected at least one, got none");
  if (borders.is_cpu()) check_borders(borders, longest, T);  // a look at other devices would wait for them
}

cpu::AttentionSizes sizes_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  return {.B = 1,
          .L = q.size(0),
          .H = q.size(1),
          .Hkv = k.size(1),
          .dk = q.size(2),
          .dv = v.size(2),
          .C = 0,
          .chunk = 0,
          .previous_chunks = 0,
          .scale = static_cast<float>(scale),
          .dropout_threshold = 0,
          .kept = 1,
          .dropout_key = 0};
}

cpu::AttentionBorders borders_of(const at::Tensor& borders) {
  return {borders.const_data_ptr<int32_t>(), borders.numel() - 1};
}

template <class T>
cpu::AttentionInputs<T> inputs_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return {pointer<T>(q), pointer<T>(k), pointer<T>(v), nullptr, nullptr, nullptr};
}

// o, and the logarithms of the softmax's denominators [H, T].
Pair forward_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& borders,
                 int64_t /*longest*/, double scale) {
  const auto q_ = q.contiguous(), k_ = k.contiguous(), v_ = v.contiguous(), borders_ = borders.contiguous();
  const auto sizes = sizes_of(q, k, v, scale);
  const auto o = at::empty({sizes.L, sizes.H, sizes.dv}, q.options());
  const auto lse = at::empty({sizes.H, sizes.L}, q.options().dtype(at::kFloat));
  with_element_type(q, [&]<class T>(T*) {
    cpu::packed_attention_forward(sizes, inputs_of<T>(q_, k_, v_), borders_of(borders_),
                                  mutable_pointer<T>(o), mutable_pointer<float>(lse));
  });
  return {o, lse};
}

Triple backward_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& borders,
                    const at::Tensor& o, const at::Tensor& lse, const at::Tensor& d_o, int64_t /*longest*/,
                    double scale) {
  const auto q_ = q.contiguous(), k_ = k.contiguous(), v_ = v.contiguous(), borders_ = borders.contiguous();
  const auto d_o_ = d_o.contiguous();
  const auto dq = at::empty_like(q_), dk = at::empty_like(k_), dv = at::empty_like(v_);
  with_element_type(q, [&]<class T>(T*) {
    cpu::packed_attention_backward(sizes_of(q, k, v, scale), inputs_of<T>(q_, k_, v_), borders_of(borders_),
                                   pointer<T>(o), pointer<float>(lse), pointer<T>(d_o_),
                                   mutable_pointer<T>(dq), mutable_pointer<T>(dk), mutable_pointer<T>(dv));
  });
  return {dq, dk, dv};
}

struct PackedAttention : torch::autograd::Function<PackedAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& borders, int64_t longest, double scale) {
    static const auto op = registered<decltype(forward_cpu)>("megalodon::packed_attention_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [o, lse] = op.call(q, k, v, borders, longest, scale);
    ctx->save_for_backward({q, k, v, borders, o, lse});
    ctx->saved_data["longest"] = longest;
    ctx->saved_data["scale"] = scale;
    return o;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::packed_attention_backward");
    const auto x = ctx->get_saved_variables();
    const auto [dq, dk, dv] =
        op.call(x[0], x[1], x[2], x[3], x[4], x[5], dy[0], ctx->saved_data["longest"].toInt(),
                ctx->saved_data["scale"].toDouble());
    return {dq, dk, dv, {}, {}, {}};
  }
};

}  // namespace

bool has_packed_kernel(at::Device device, at::ScalarType type, int64_t key_width, int64_t value_width) {
  if (device.is_cpu()) return type == at::kFloat || type == at::kBFloat16;
  return device.is_cuda() && has_cuda_kernels() && type == at::kBFloat16 && key_width == value_width &&
         key_width <= 256 && key_width % 8 == 0;
}

at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Sequences& sequences, double scale) {
  const auto& [borders, longest] = sequences;
  check(q, k, v, borders, longest);
  if (!has_packed_kernel(q.device(), q.scalar_type(), q.size(2), v.size(2)))
    return packed_attention_reference(q, k, v, sequences, scale);
  return PackedAttention::apply(q, k, v, borders, longest, scale);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor borders, int longest, float scale) -> "
      "(Tensor o, Tensor lse)");
  m.def(
      "packed_attention_backward(Tensor q, Tensor k, Tensor v, Tensor borders, Tensor o, Tensor lse, Tensor "
      "d_o, int longest, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("packed_attention_forward", &forward_cpu);
  m.impl("packed_attention_backward", &backward_cpu);
}

}  // namespace megalodon::ops
