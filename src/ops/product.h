#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Products of matrices, [M, K] and [K, N], or of stacks of them, [S, M, K] and [S, K, N]. On processors of
// AMD with AVX-512 those of float32 that are worth it are oneDNN's, since torch's (MKL's) take AVX2 there:
// twice as fast on Zen 5. Where a derivative is wanted they are torch's.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);
// a b + bias [N] + added [M, N], of matrices; `added` or undefined.
at::Tensor product_with_bias(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias,
                             const at::Tensor& added = {});
// a b in `type`: of bfloat16 in float32 without a rounding between where a device can; the CPU's is rounded.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);
// to = a b, of matrices.
void put_product(at::Tensor to, const at::Tensor& a, const at::Tensor& b);
// sum += a b, in the type of `sum`, as above.
void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b);

// x w^T + bias, x [M, K], w [N, K], bias [N] or none; or of stacks, x [S, M, K], w [S, N, K] without bias. In
// the type of x, whatever those of weight and bias.
at::Tensor linear_layer(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

// While one lives, the weights that its thread gives to linear_layer() do not change: those on a CPU are kept
// in the type of x, and in oneDNN's order where its products are a fifth faster for that.
class ConstantWeights {
 public:
  ConstantWeights();
  ~ConstantWeights();
  ConstantWeights(const ConstantWeights&) = delete;
  ConstantWeights& operator=(const ConstantWeights&) = delete;

 private:
  bool outermost_;
};

// oneDNN's product of float32 matrices; throws where torch has none.
at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {});
bool has_onednn_product();

}  // namespace megalodon::ops
