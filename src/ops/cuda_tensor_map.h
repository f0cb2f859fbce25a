#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// How the copy engine (TMA) sees an array of three dimensions, the last of them outermost.
struct TensorMapShape {
  std::int64_t sizes[3];    // numbers, from the innermost dimension on
  std::int64_t strides[2];  // of the other two, in numbers
  int box[3];               // numbers that a copy takes; those outside the array are zero
  CUtensorMapSwizzle swizzle;
  CUtensorMapL2promotion promotion;
};

// Throws where the driver makes no such map; `op` is named.
template <class T>
CUtensorMap tensor_map(const char* op, const T* data, const TensorMapShape& s) {
  static_assert(std::is_same_v<T, Bfloat16> || std::is_same_v<T, float>);
  constexpr auto kType = sizeof(T) == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const auto size = [](std::int64_t x) { return static_cast<cuuint64_t>(x); };
  const auto length = [](int x) { return static_cast<cuuint32_t>(x); };
  const cuuint64_t sizes[3] = {size(s.sizes[0]), size(s.sizes[1]), size(s.sizes[2])};
  const cuuint64_t strides[2] = {size(s.strides[0]) * sizeof(T), size(s.strides[1]) * sizeof(T)};
  const cuuint32_t box[3] = {length(s.box[0]), length(s.box[1]), length(s.box[2])}, every[3] = {1, 1, 1};
  [[maybe_unused]] static const thread_local auto has_context = cudaFree(nullptr);  // as the driver wants
  CUtensorMap map{};
  const auto result = encode == nullptr ? CUDA_ERROR_NOT_SUPPORTED
                                        : encode(&map, kType, 3, const_cast<T*>(data), sizes, strides, box,
                                                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, s.swizzle, s.promotion,
                                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("[") + op + "] the CUDA driver makes no tensor map (error " +
                             std::to_string(result) + "): is it older than the device?");
  }
  return map;
}

// A matrix whose rows are `pitch` numbers apart, for copies of boxes of `box_rows` rows and `box_blocks`
// times 128 bytes of them: copy_tile() of ops/cuda_hopper.h. Rows in multiples of 128 bytes.
template <class T>
CUtensorMap matrix_map(const char* op, const T* matrix, std::int64_t rows, std::int64_t columns,
                       std::int64_t pitch, int box_rows, int box_blocks) {
  constexpr int kBlock = 128 / sizeof(T);
  return tensor_map(op, matrix,
                    {.sizes = {kBlock, rows, columns / kBlock},
                     .strides = {pitch, kBlock},
                     .box = {kBlock, box_rows, box_blocks},
                     .swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

}  // namespace megalodon::ops::cuda
