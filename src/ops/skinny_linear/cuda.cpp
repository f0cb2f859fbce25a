#include "ops/skinny_linear/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <deque>

#include "ops/cuda_launch.h"
#include "ops/step_program/cuda.h"

namespace megalodon::ops {
namespace {
using OptionalList = c10::List<std::optional<at::Tensor>>;

// Operands as the kernels take them, which stay until these are launched.
class Held {
 public:
  const at::Tensor& operator()(const std::optional<at::Tensor>& x, int64_t elements) {
    return tensors_.emplace_back(x ? aligned(*x, elements) : at::Tensor());
  }

 private:
  std::deque<at::Tensor> tensors_;
};

std::vector<at::Tensor> forward(at::TensorList x, at::TensorList weight, const OptionalList& up,
                                const OptionalList& bias, const OptionalList& add,
                                const OptionalList& norm_weight, const OptionalList& norm_bias,
                                at::IntArrayRef norm, at::IntArrayRef silu, double eps) {
  const int64_t in = x[0].size(-1);
  cuda::SkinnyCall call{};
  call.layers = static_cast<int>(x.size());
  call.rows = static_cast<int>(x[0].numel() / in);
  call.width = static_cast<int>(in);
  call.eps = static_cast<float>(eps);
  Held keep;
  std::vector<at::Tensor> results;
  for (std::size_t i = 0; i < x.size(); ++i) {
    auto shape = x[i].sizes().vec();
    shape.back() = weight[i].size(0);
    results.push_back(at::empty(shape, x[i].options()));
    call.layer[i] = {.x = pointer<Bfloat16>(keep(x[i], 8)),
                     .weight = pointer<Bfloat16>(keep(weight[i], 8)),
                     .up = pointer<Bfloat16>(keep(up.get(i), 8)),
                     .add = pointer<Bfloat16>(keep(add.get(i), 1)),
                     .bias = pointer<float>(keep(bias.get(i), 1)),
                     .norm_weight = pointer<float>(keep(norm_weight.get(i), 4)),
                     .norm_bias = pointer<float>(keep(norm_bias.get(i), 4)),
                     .y = mutable_pointer<Bfloat16>(results[i]),
                     .norm = static_cast<InputNorm>(norm[i]),
                     .silu = silu[i] != 0,
                     .out = static_cast<int>(shape.back()),
                     .first_tile = 0};
  }
  launch(x[0], [&](cudaStream_t stream) {
    if (call.rows > kMostKernelRows) return cuda::wide_products(call, stream);
    cuda::skinny_linear(call, stream);
    cuda::note_call(call, stream);
  });
  return results;
}

std::vector<at::Tensor> finish(at::TensorList sums, const OptionalList& up, const OptionalList& bias,
                               const OptionalList& add, at::IntArrayRef silu) {
  cuda::FinishCall call{};
  call.layers = static_cast<int>(sums.size());
  call.rows = static_cast<int>(sums[0].size(0));
  Held keep;
  std::vector<at::Tensor> results;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const std::optional<at::Tensor> of_up = up.get(i);
    results.push_back(at::empty(sums[i].sizes(), sums[i].options().dtype(at::kBFloat16)));
    call.layer[i] = {.sums = pointer<float>(sums[i]),
                     .up = of_up ? pointer<float>(*of_up) : nullptr,
                     .bias = pointer<float>(keep(bias.get(i), 4)),
                     .pitch = sums[i].stride(0),
                     .up_pitch = of_up ? of_up->stride(0) : 0,
                     .add = pointer<Bfloat16>(keep(add.get(i), 4)),
                     .y = mutable_pointer<Bfloat16>(results[i]),
                     .silu = silu[i] != 0,
                     .out = static_cast<int>(sums[i].size(1)),
                     .first_pack = 0};
  }
  launch(sums[0], [&](cudaStream_t stream) { cuda::finish_products(call, stream); });
  return results;
}

bool has_wide_products(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  return cuda::has_wide_products();
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("skinny_linear", &forward);
  m.impl("finish_products", &finish);
  m.impl("has_wide_products", &has_wide_products);
}

}  // namespace megalodon::ops
