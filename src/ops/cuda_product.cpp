#include "ops/cuda_product.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <cublasLt.h>

#include <bit>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

cudaDataType_t library_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return CUDA_R_32F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    case at::kFloat8_e4m3fn:
      return CUDA_R_8F_E4M3;
    case at::kFloat8_e5m2:
      return CUDA_R_8F_E5M2;
    default:
      TORCH_CHECK(false, "product_into: expected float32, bfloat16 or float8, got ", type);
  }
}

// A contiguous matrix [rows, columns] as the library sees it, columns first: its transpose.
cublasLtMatrixLayoutOpaque_t layout_of(const at::Tensor& x) {
  cublasLtMatrixLayoutOpaque_t layout;
  TORCH_CUDABLAS_CHECK(cublasLtMatrixLayoutInit(&layout, library_type(x.scalar_type()),
                                                static_cast<uint64_t>(x.size(1)),
                                                static_cast<uint64_t>(x.size(0)), x.size(1)));
  return layout;
}

// Up to the 256 that the library takes for granted.
uint32_t alignment_of(const at::Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr()) | 256;
  return uint32_t{1} << std::countr_zero(address);
}

class Description {
 public:
  Description() { TORCH_CUDABLAS_CHECK(cublasLtMatmulDescInit(&value_, CUBLAS_COMPUTE_32F, CUDA_R_32F)); }
  template <class T>
  void set(cublasLtMatmulDescAttributes_t what, const T& value) {
    TORCH_CUDABLAS_CHECK(
        cublasLtMatmulDescSetAttribute(&value_, what, static_cast<const void*>(&value), sizeof value));
  }
  cublasLtMatmulDesc_t get() { return &value_; }

 private:
  cublasLtMatmulDescOpaque_t value_;
};

class Preference {
 public:
  Preference() { TORCH_CUDABLAS_CHECK(cublasLtMatmulPreferenceInit(&value_)); }
  template <class T>
  void set(cublasLtMatmulPreferenceAttributes_t what, const T& value) {
    TORCH_CUDABLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&value_, what, &value, sizeof value));
  }
  cublasLtMatmulPreference_t get() { return &value_; }

 private:
  cublasLtMatmulPreferenceOpaque_t value_;
};

}  // namespace

// y^T = b a^T + added^T, as the library counts rows and columns: its first operand is b.
void product_into(const at::Tensor& y, const ProductOperand& a, const ProductOperand& b,
                  const ProductOptions& options) {
  const c10::cuda::CUDAGuard guard(y.device());
  const auto& added = options.added ? *options.added : y;
  auto of_a = layout_of(a.x), of_b = layout_of(b.x), of_y = layout_of(y);
  Description description;
  description.set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (a.scale.defined()) {
    description.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, b.scale.const_data_ptr());
    description.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, a.scale.const_data_ptr());
    description.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(options.fast_sums));
  }
  if (options.bias) {
    description.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    description.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, options.bias->const_data_ptr());
    description.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                    static_cast<int32_t>(library_type(options.bias->scalar_type())));
  }
  const size_t bytes = at::cuda::getCUDABlasLtWorkspaceSize();
  Preference preference;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes);
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(b.x));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(a.x));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(added));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(y));

  const auto handle = at::cuda::getCurrentCUDABlasLtHandle();
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  TORCH_CUDABLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(handle, description.get(), &of_b, &of_a, &of_y, &of_y,
                                                      preference.get(), 1, &found, &count));
  TORCH_CHECK(count > 0, "cuBLASLt has no algorithm for the product of ", a.x.toString(), a.x.sizes(),
              " and the transpose of ", b.x.toString(), b.x.sizes());
  const float one = 1, beta = options.added ? 1 : 0;
  TORCH_CUDABLAS_CHECK(
      cublasLtMatmul(handle, description.get(), &one, b.x.const_data_ptr(), &of_b, a.x.const_data_ptr(),
                     &of_a, &beta, added.const_data_ptr(), &of_y, y.mutable_data_ptr(), &of_y, &found.algo,
                     at::cuda::getCUDABlasLtWorkspace(), bytes, c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace megalodon::ops
