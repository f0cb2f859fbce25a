#include "ops/cuda_product.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/Exceptions.h>
#include <cublasLt.h>
#include <torch/library.h>
#include <ATen/cuda/CUDAGraphsUtils.cuh>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

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

// A matrix as the library sees it, columns first: its transpose where rows lie in memory.
struct Matrix {
  bool has_rows;  // in memory, else columns
  int64_t pitch;  // of these, in elements
  cublasLtMatrixLayoutOpaque_t layout;

  explicit Matrix(const at::Tensor& x) : has_rows(x.stride(1) == 1 || x.size(1) == 1) {
    TORCH_CHECK(has_rows || x.stride(0) == 1 || x.size(0) == 1,
                "product_into: expected rows or columns that lie in memory, got strides ", x.strides());
    const int64_t across = has_rows ? 0 : 1, along = 1 - across;
    pitch = std::max(x.stride(across), x.size(along));
    TORCH_CUDABLAS_CHECK(cublasLtMatrixLayoutInit(&layout, library_type(x.scalar_type()),
                                                  static_cast<uint64_t>(x.size(along)),
                                                  static_cast<uint64_t>(x.size(across)), pitch));
  }
};

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

// A product as the library is asked for it: y^T = b^T a^T + added^T, since it counts rows and columns the
// other way round. Its first operand is b.
class Product {
 public:
  Product(const at::Tensor& y, const ProductOperand& a, const ProductOperand& b,
          const ProductOptions& options)
      : y_(y),
        a_(a.x),
        b_(b.x),
        added_(options.added ? *options.added : y),
        adds_(options.added.has_value()),
        of_a_(a.x),
        of_b_(b.x),
        of_y_(y) {
    TORCH_CHECK(of_y_.has_rows, "product_into: expected rows of y that lie in memory");
    if (adds_) {
      const Matrix of_added(added_);
      TORCH_CHECK(of_added.has_rows && of_added.pitch == of_y_.pitch,
                  "product_into: expected what is added to lie as y does");
    }
    description_.set(CUBLASLT_MATMUL_DESC_TRANSA, of_b_.has_rows ? CUBLAS_OP_N : CUBLAS_OP_T);
    description_.set(CUBLASLT_MATMUL_DESC_TRANSB, of_a_.has_rows ? CUBLAS_OP_N : CUBLAS_OP_T);
    if (a.scale.defined()) {
      description_.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, b.scale.const_data_ptr());
      description_.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, a.scale.const_data_ptr());
      description_.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(options.fast_sums));
    }
    if (options.bias) {
      description_.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      description_.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, options.bias->const_data_ptr());
      description_.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                       static_cast<int32_t>(library_type(options.bias->scalar_type())));
    }
    const auto type = [](const at::Tensor& x) { return static_cast<int64_t>(x.scalar_type()); };
    kind_ = {y.get_device(),
             type(y),
             type(a_),
             type(b_),
             magnitude(y.size(0)),
             magnitude(y.size(1)),
             magnitude(a_.size(1)),
             of_y_.pitch,
             of_a_.pitch,
             of_b_.pitch,
             of_a_.has_rows,
             of_b_.has_rows,
             alignment_of(y) | alignment_of(a_) << 10 | int64_t{alignment_of(b_)} << 20,
             int64_t{alignment_of(added_)} | adds_ << 10 | is_in_place() << 11 |
                 options.bias.has_value() << 12 | options.fast_sums << 13};
  }

  // All that decides which algorithms there are, and about how large the product is.
  using Kind = std::array<int64_t, 14>;
  const Kind& kind() const { return kind_; }
  std::array<int64_t, 3> sizes() const { return {y_.size(0), y_.size(1), a_.size(1)}; }
  double operations() const {
    return 2.0 * static_cast<double>(y_.numel()) * static_cast<double>(a_.size(1));
  }
  bool is_in_place() const { return adds_ && added_.const_data_ptr() == y_.const_data_ptr(); }

  // The library's proposals, best guess first.
  std::vector<cublasLtMatmulAlgo_t> algorithms(int most) {
    Preference preference;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(b_));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(a_));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(added_));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(y_));
    std::vector<cublasLtMatmulHeuristicResult_t> found(static_cast<size_t>(most));
    int count = 0;
    TORCH_CUDABLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(handle_, description_.get(), &of_b_.layout,
                                                        &of_a_.layout, &of_y_.layout, &of_y_.layout,
                                                        preference.get(), most, found.data(), &count));
    TORCH_CHECK(count > 0, "cuBLASLt has no algorithm for the product of ", a_.toString(), a_.sizes(),
                " and ", b_.toString(), b_.sizes());
    std::vector<cublasLtMatmulAlgo_t> result;
    for (int i = 0; i < count; ++i) result.push_back(found[static_cast<size_t>(i)].algo);
    return result;
  }

  // Whether an algorithm that was found for another product of the kind does for this one.
  bool takes(const cublasLtMatmulAlgo_t& algorithm) {
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(handle_, description_.get(), &of_b_.layout, &of_a_.layout, &of_y_.layout,
                                   &of_y_.layout, &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
           result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes;
  }

  // `to`: as y, or y itself.
  cublasStatus_t compute(const at::Tensor& to, const cublasLtMatmulAlgo_t& algorithm) {
    const float one = 1, beta = adds_ ? 1 : 0;
    return cublasLtMatmul(handle_, description_.get(), &one, b_.const_data_ptr(), &of_b_.layout,
                          a_.const_data_ptr(), &of_a_.layout, &beta, added_.const_data_ptr(), &of_y_.layout,
                          to.mutable_data_ptr(), &of_y_.layout, &algorithm, workspace_.mutable_data_ptr(),
                          kWorkspaceBytes, c10::cuda::getCurrentCUDAStream().stream());
  }

  // The fastest of the proposals, by the GPU's clock. y is written.
  cublasLtMatmulAlgo_t fastest() {
    auto algorithms = this->algorithms(kProposals);
    const auto to = is_in_place() ? at::empty_strided(y_.sizes(), y_.strides(), y_.options()) : y_;
    const auto milliseconds = [&](const cublasLtMatmulAlgo_t& algorithm, int runs) {
      at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
      begin.record();
      for (int i = 0; i < runs; ++i)
        if (compute(to, algorithm) != CUBLAS_STATUS_SUCCESS) return std::numeric_limits<float>::infinity();
      end.record();
      end.synchronize();
      return begin.elapsed_time(end) / static_cast<float>(runs);
    };
    const auto& guess = algorithms.front();
    milliseconds(guess, 1);
    const int runs = std::clamp(static_cast<int>(kTimedMilliseconds / milliseconds(guess, 1)), 1, 64);
    std::vector<float> least(algorithms.size(), std::numeric_limits<float>::infinity());
    for (int pass = 0; pass < kPasses; ++pass) {
      for (size_t i = 0; i < algorithms.size(); ++i) {
        if (pass == 0) milliseconds(algorithms[i], 1);
        least[i] = std::min(least[i], milliseconds(algorithms[i], runs));
      }
    }
    const auto best = std::min_element(least.begin(), least.end());
    return *best < kFaster * least.front() ? algorithms[static_cast<size_t>(best - least.begin())] : guess;
  }

 private:
  static constexpr size_t kWorkspaceBytes = 32 << 20;  // what the library wants on a Hopper GPU
  static constexpr int kProposals = 8, kPasses = 3;
  static constexpr float kTimedMilliseconds = 0.5F, kFaster = 0.99F;

  // n, or a number that stands for those up to a quarter more.
  static int64_t magnitude(int64_t n) {
    const int shift = std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(n))) - 3);
    return n >> shift << shift;
  }

  const at::Tensor &y_, &a_, &b_, &added_;
  bool adds_;
  Matrix of_a_, of_b_, of_y_;
  Description description_;
  Kind kind_;
  cublasLtHandle_t handle_ = at::cuda::getCurrentCUDABlasLtHandle();
  at::Tensor workspace_ = at::empty({kWorkspaceBytes}, y_.options().dtype(at::kByte));
};

// Smaller ones are over before a choice could matter. Those of few rows wait for the other operand from
// memory, which timings in a row would find in the cache.
constexpr double kWorthTiming = 1 << 28;
constexpr int64_t kFewRows = 256;

cublasLtMatmulAlgo_t algorithm_for(Product& product) {
  struct Chosen {
    cublasLtMatmulAlgo_t algorithm;
    std::array<int64_t, 3> sizes;
  };
  static std::mutex mutex;
  static auto& chosen = *new std::map<Product::Kind, Chosen>;
  const auto sizes = product.sizes();
  if (product.operations() >= kWorthTiming && *std::min_element(sizes.begin(), sizes.end()) >= kFewRows &&
      !at::globalContext().deterministicAlgorithms()) {
    const std::lock_guard lock(mutex);
    auto found = chosen.find(product.kind());
    const auto records = at::cuda::currentStreamCaptureStatusMayInitCtx() != at::cuda::CaptureStatus::None;
    if (found == chosen.end() && !records)
      found = chosen.emplace(product.kind(), Chosen{product.fastest(), sizes}).first;
    if (found != chosen.end() && (found->second.sizes == sizes || product.takes(found->second.algorithm)))
      return found->second.algorithm;
  }
  return product.algorithms(1).front();
}

}  // namespace

void product_into(const at::Tensor& y, const ProductOperand& a, const ProductOperand& b,
                  const ProductOptions& options) {
  const c10::cuda::CUDAGuard guard(y.device());
  Product product(y, a, b, options);
  TORCH_CUDABLAS_CHECK(product.compute(y, algorithm_for(product)));
}

namespace {

void product_into_op(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& added) {
  product_into(y, {a}, {b}, {.bias = bias, .added = added});
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("product_into", &product_into_op);
}

}  // namespace megalodon::ops
