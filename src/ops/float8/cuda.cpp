#include "ops/float8/cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"
#include "ops/cuda_product.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> to_float8(const at::Tensor& x, at::ScalarType type, bool rows,
                                                         bool columns) {
  const auto x_ = aligned(x, 8);
  const int64_t R = x.size(0), C = x.size(1);
  TORCH_CHECK(R % 16 == 0 && C % 16 == 0, "[to_float8] x: expected sizes in multiples of 16, got ",
              x.sizes());
  const auto bytes = x.options().dtype(type);
  const auto of_rows = rows ? at::empty({R, C}, bytes) : at::Tensor(),
             of_columns = columns ? at::empty({C, R}, bytes) : at::Tensor();
  const auto scale = at::empty({}, x.options().dtype(at::kFloat)),
             largest = at::zeros({}, x.options().dtype(at::kInt));
  if (x.numel() == 0) return {of_rows, of_columns, scale.fill_(1)};
  launch(x, [&](cudaStream_t stream) {
    auto* const most = mutable_pointer<uint32_t>(largest);
    cuda::largest_magnitude(pointer<Bfloat16>(x_), x_.numel(), most, stream);
    cuda::cast_to_float8(pointer<Bfloat16>(x_), R, C, type == at::kFloat8_e4m3fn, most,
                         mutable_pointer<uint8_t>(of_rows), mutable_pointer<uint8_t>(of_columns),
                         mutable_pointer<float>(scale), stream);
  });
  return {of_rows, of_columns, scale};
}

at::Tensor float8_product(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                          const at::Tensor& b_scale, at::ScalarType type, bool fast_sums,
                          const Optional& bias, const Optional& added) {
  const auto y = at::empty({a.size(0), b.size(0)}, a.options().dtype(type));
  const auto a_ = a.contiguous(), b_ = b.contiguous().t();
  const auto contiguous = [](const Optional& x) { return x ? Optional(x->contiguous()) : std::nullopt; };
  product_into(y, {a_, a_scale}, {b_, b_scale},
               {.bias = contiguous(bias), .added = contiguous(added), .fast_sums = fast_sums});
  return y;
}

bool has_float8_units(const at::Tensor& x) {
  const auto* const properties = at::cuda::getDeviceProperties(x.device().index());
  return properties->major * 10 + properties->minor >= 89;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("to_float8", &to_float8);
  m.impl("float8_product", &float8_product);
  m.impl("has_float8_units", &has_float8_units);
}

}  // namespace megalodon::ops
