#include <cuda_fp8.h>

#include "ops/cuda_device.h"
#include "ops/float8/cuda.h"
#include "ops/float8/largest.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256, kPack = 8;  // numbers of 16 bytes

__device__ std::uint32_t larger_halves(std::uint32_t a, std::uint32_t b) {
  return __vmaxu2(a, b & 0x7fff7fff);
}

// Magnitudes of bfloat16 are ordered as their bits, with NaN above all.
__global__ void __launch_bounds__(kThreads)
    largest(const uint4* x, std::int64_t packs, std::uint32_t* largest) {
  std::uint32_t most = 0;
#pragma unroll 4
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < packs;
       i += std::int64_t{gridDim.x} * kThreads) {
    const uint4 v = x[i];
    most = larger_halves(larger_halves(larger_halves(larger_halves(most, v.x), v.y), v.z), v.w);
  }
  most = max(most >> 16, most & 0xffff);
  most = __reduce_max_sync(~0u, most);
  if (threadIdx.x % 32 == 0) atomicMax(largest, most << 16);
}

template <__nv_fp8_interpretation_t kType>
__device__ std::uint32_t four(const float* v) {
  const std::uint32_t low = __nv_cvt_float2_to_fp8x2({v[0], v[1]}, __NV_SATFINITE, kType),
                      high = __nv_cvt_float2_to_fp8x2({v[2], v[3]}, __NV_SATFINITE, kType);
  return low | high << 16;
}

// A block takes kTileRows x kTileColumns numbers. Of those in shared memory, each row is 68 bytes from the
// one before and each 32 rows 8 more, so that the eight threads that read 16 rows each of a column meet other
// banks.
constexpr int kTileRows = 128, kTileColumns = 64, kPitch = kTileColumns + 4;

__device__ int tile_offset(int row, int column) {
  return row * kPitch + row / 32 * 8 + column;
}

template <__nv_fp8_interpretation_t kType>
__global__ void __launch_bounds__(kThreads)
    cast(const Bfloat16* x, std::int64_t R, std::int64_t C, const std::uint32_t* largest, std::uint8_t* rows,
         std::uint8_t* columns, float* scale) {
  __shared__ alignas(16) std::uint8_t tile[kTileRows * kPitch + kTileRows / 32 * 8];
  const float most = __uint_as_float(*largest),
              step = most == 0 ? 1 : most / (kType == __NV_E4M3 ? kLargestE4m3 : kLargestE5m2),
              inverse = 1 / step;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *scale = step;
  const bool finite = isfinite(most);
  const std::int64_t first_row = std::int64_t{blockIdx.y} * kTileRows,
                     first_column = std::int64_t{blockIdx.x} * kTileColumns;
#pragma unroll
  for (int i = 0; i < kTileRows * kTileColumns / kPack / kThreads; ++i) {
    const int pack = i * kThreads + threadIdx.x, row = pack / (kTileColumns / kPack),
              column = pack % (kTileColumns / kPack) * kPack;
    if (first_row + row >= R || first_column + column >= C) continue;
    const std::int64_t at = (first_row + row) * C + first_column + column;
    float v[kPack];
    load(x + at, v);
#pragma unroll
    for (int j = 0; j < kPack; ++j) v[j] = finite ? v[j] * inverse : __uint_as_float(0x7fffffff);
    const uint2 bytes{four<kType>(v), four<kType>(v + 4)};
    if (rows != nullptr) *reinterpret_cast<uint2*>(rows + at) = bytes;
    if (columns == nullptr) continue;
    auto* const to = reinterpret_cast<std::uint32_t*>(tile + tile_offset(row, column));
    to[0] = bytes.x, to[1] = bytes.y;
  }
  if (columns == nullptr) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTileRows * kTileColumns / 16 / kThreads; ++i) {
    const int part = i * kThreads + threadIdx.x, column = part / (kTileRows / 16),
              row = part % (kTileRows / 16) * 16;
    if (first_row + row >= R || first_column + column >= C) continue;
    std::uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b)
        words[w] |= std::uint32_t{tile[tile_offset(row + 4 * w + b, column)]} << (8 * b);
    }
    *reinterpret_cast<uint4*>(columns + (first_column + column) * R + first_row + row) = {words[0], words[1],
                                                                                          words[2], words[3]};
  }
}

}  // namespace

void largest_magnitude(const Bfloat16* x, std::int64_t n, std::uint32_t* most, cudaStream_t stream) {
  const std::int64_t packs = n / kPack;
  largest<<<grid_size(ceil_div(packs, 4 * kThreads), 132 * 8), kThreads, 0, stream>>>(
      reinterpret_cast<const uint4*>(x), packs, most);
}

void cast_to_float8(const Bfloat16* x, std::int64_t R, std::int64_t C, bool e4m3, const std::uint32_t* most,
                    std::uint8_t* rows, std::uint8_t* columns, float* scale, cudaStream_t stream) {
  const dim3 grid(grid_size(ceil_div(C, kTileColumns)), grid_size(ceil_div(R, kTileRows)));
  if (e4m3) {
    cast<__NV_E4M3><<<grid, kThreads, 0, stream>>>(x, R, C, most, rows, columns, scale);
  } else {
    cast<__NV_E5M2><<<grid, kThreads, 0, stream>>>(x, R, C, most, rows, columns, scale);
  }
}

}  // namespace megalodon::ops::cuda
