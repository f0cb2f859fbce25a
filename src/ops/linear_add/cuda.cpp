#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <cublasLt.h>
#include <torch/library.h>

#include <bit>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

// A contiguous matrix [rows, columns] as the library sees it, columns first: its transpose.
cublasLtMatrixLayoutOpaque_t layout_of(const at::Tensor& x) {
  cublasLtMatrixLayoutOpaque_t layout;
  TORCH_CUDABLAS_CHECK(cublasLtMatrixLayoutInit(&layout, CUDA_R_16BF, static_cast<uint64_t>(x.size(1)),
                                                static_cast<uint64_t>(x.size(0)), x.size(1)));
  return layout;
}

// Up to the 256 that the library takes for granted.
uint32_t alignment_of(const at::Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr()) | 256;
  return uint32_t{1} << std::countr_zero(address);
}

// y^T = weight x^T + added^T, as the library counts rows and columns.
at::Tensor linear_add(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& added) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), added_ = added.contiguous();
  const auto y = at::empty_like(added_);
  auto a = layout_of(weight_), b = layout_of(x_), d = layout_of(y);
  cublasLtMatmulDescOpaque_t description;
  TORCH_CUDABLAS_CHECK(cublasLtMatmulDescInit(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t turned = CUBLAS_OP_T;
  TORCH_CUDABLAS_CHECK(
      cublasLtMatmulDescSetAttribute(&description, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned));
  cublasLtMatmulPreferenceOpaque_t preference;
  TORCH_CUDABLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
    TORCH_CUDABLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, what, &value, sizeof value));
  };
  const size_t bytes = at::cuda::getCUDABlasLtWorkspaceSize();
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(weight_));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(x_));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(added_));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(y));

  const auto handle = at::cuda::getCurrentCUDABlasLtHandle();
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  TORCH_CUDABLAS_CHECK(
      cublasLtMatmulAlgoGetHeuristic(handle, &description, &a, &b, &d, &d, &preference, 1, &found, &count));
  TORCH_CHECK(count > 0, "[linear_add] x: cuBLASLt has no algorithm for ", x.sizes(), " and ",
              weight.sizes());
  const float one = 1;
  TORCH_CUDABLAS_CHECK(
      cublasLtMatmul(handle, &description, &one, weight_.const_data_ptr(), &a, x_.const_data_ptr(), &b, &one,
                     added_.const_data_ptr(), &d, y.mutable_data_ptr(), &d, &found.algo,
                     at::cuda::getCUDABlasLtWorkspace(), bytes, c10::cuda::getCurrentCUDAStream().stream()));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("linear_add", &linear_add);
}

}  // namespace megalodon::ops
