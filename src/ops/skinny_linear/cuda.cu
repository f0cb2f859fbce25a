#include "ops/skinny_linear/cuda.h"

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"

// Products of few rows are the reading of their weights. A block makes 16 outputs of all rows, or 8 where
// each is of two products; its warps share the features, and each reads its weights straight into the
// registers from which the tensor cores take them: before x is there, as many as fit. As the order of a sum's
// terms is free, the two operands agree that a thread has 8 neighbouring features.
namespace megalodon::ops::cuda {
namespace {

constexpr int kTile = 16;   // outputs
constexpr int kChunk = 32;  // features: 8 of each thread of a row

// For N groups of 8 rows: chunks that a warp has in flight, and warps of a block.
template <int N>
constexpr int kInFlight = N == 1 ? 8 : 4;
template <int N>
constexpr int kMostWarps = N == 4 ? 12 : 16;

__device__ uint4 stream_weights(const Bfloat16* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// d += a b, a [16, 16], b [16, 8].
__device__ void multiply_add(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                             unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Mean (0 for RMS norm) and reciprocal deviation of a row, by a warp.
__device__ float2 moments(const Bfloat16* x, int width, InputNorm norm, float eps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = 1 / static_cast<float>(width);
  float v[8], sum = 0, squares = 0;
  if (norm == InputNorm::layer) {
    for (int i = lane * 8; i < width; i += 32 * 8) {
      load(x + i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += v[j];
    }
  }
  const float mean = warp_sum(sum) * scale;
  for (int i = lane * 8; i < width; i += 32 * 8) {
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (v[j] - mean) * (v[j] - mean);
  }
  return {mean, 1 / sqrtf(warp_sum(squares) * scale + eps)};
}

// The rows of x, normalised, in shared memory; for all threads of the block.
__device__ void normalise(const SkinnyCall& c, const SkinnyLayer& layer, Bfloat16* to) {
  __shared__ float2 row_moments[kMostSkinnyNormRows];
  const int width = static_cast<int>(c.width), threads = static_cast<int>(blockDim.x);
  for (int row = static_cast<int>(threadIdx.x) / 32; row < c.rows; row += threads / 32) {
    const float2 m = moments(layer.x + row * width, width, layer.norm, c.eps);
    if (threadIdx.x % 32 == 0) row_moments[row] = m;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) * 4; i < c.rows * width; i += threads * 4) {
    const int row = i / width, feature = i % width;
    float v[4], weight[4], bias[4];
    load(layer.x + i, v);
    if (layer.norm_weight != nullptr) load(layer.norm_weight + feature, weight);
    if (layer.norm_bias != nullptr) load(layer.norm_bias + feature, bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = (v[j] - row_moments[row].x) * row_moments[row].y;
      if (layer.norm_weight != nullptr) v[j] *= 1 + weight[j];
      if (layer.norm_bias != nullptr) v[j] += bias[j];
    }
    store(v, to + i);
  }
  __syncthreads();
}

template <int N>
__global__ void __launch_bounds__(kMostWarps<N> * 32) forward(const __grid_constant__ SkinnyCall c) {
  constexpr int P = kInFlight<N>, kColumns = 8 * N;
  extern __shared__ __align__(16) float sums[];  // [warps, rows, kTile], then normalised rows [rows, width]
  int index = 0;
  while (index + 1 < c.layers && blockIdx.x >= c.layer[index + 1].first_tile) ++index;
  const SkinnyLayer& layer = c.layer[index];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int g = lane / 4, t = lane % 4;  // row of a fragment, and place in it
  const bool paired = layer.up != nullptr;
  const int outputs = paired ? kTile / 2 : kTile;
  const std::int64_t first = std::int64_t{blockIdx.x - layer.first_tile} * outputs;
  const auto weights_of = [&](const Bfloat16* weight, std::int64_t out) {
    return weight + min(out, layer.out - 1) * c.width + 8 * t;
  };
  const Bfloat16* const low = weights_of(layer.weight, first + g);
  const Bfloat16* const high = weights_of(paired ? layer.up : layer.weight, first + g + (paired ? 0 : 8));
  const int chunks = static_cast<int>(c.width / kChunk);

  uint4 a[P][2];
  const auto read_weights = [&](int begin) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      a[i][0] = a[i][1] = uint4{0, 0, 0, 0};
      if (begin + i < chunks) {
        a[i][0] = stream_weights(low + std::int64_t{begin + i} * kChunk);
        a[i][1] = stream_weights(high + std::int64_t{begin + i} * kChunk);
      }
    }
  };
  read_weights(warp * P);
  // What a thread finishes is of one output, of several rows.
  const std::int64_t out = first + thread % outputs;
  const bool has_output = out < layer.out;
  const float bias = layer.bias != nullptr && has_output ? layer.bias[out] : 0;
  for (int line = thread; layer.norm != InputNorm::none && line * 32 < c.width; line += threads) {
    if (layer.norm_weight != nullptr) prefetch(layer.norm_weight + line * 32);
    if (layer.norm_bias != nullptr) prefetch(layer.norm_bias + line * 32);
  }
  wait_for_previous();
  const auto added = [&](int row) {
    return layer.add != nullptr && has_output && row < c.rows ? to_float(layer.add[row * layer.out + out])
                                                              : 0;
  };
  const float first_added = added(thread / outputs);
  const Bfloat16* x = layer.x;
  if (layer.norm != InputNorm::none) {
    auto* const rows = reinterpret_cast<Bfloat16*>(sums + warps * kColumns * kTile);
    normalise(c, layer, rows);
    x = rows;
  }
  constexpr int S = N == 1 ? 2 : 1;  // sums side by side, where there are registers for them
  float sum[N][S][4] = {};
  for (int begin = warp * P; begin < chunks; begin += warps * P) {
    if (begin != warp * P) read_weights(begin);
#pragma unroll
    for (int i = 0; i < P; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int row = 8 * n + g;
        uint4 b{0, 0, 0, 0};
        if (row < c.rows && begin + i < chunks)
          b = *reinterpret_cast<const uint4*>(x + row * c.width + std::int64_t{begin + i} * kChunk + 8 * t);
        multiply_add(sum[n][0], a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y, b.x, b.y);
        multiply_add(sum[n][S - 1], a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w, b.z, b.w);
      }
    }
  }
  float* const mine = sums + warp * kColumns * kTile;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mine[(8 * n + 2 * t + j % 2) * kTile + g + j / 2 * 8] = sum[n][0][j] + (S > 1 ? sum[n][S - 1][j] : 0);
  }
  __syncthreads();
  if (!has_output) return;
  for (int row = thread / outputs; row < c.rows; row += threads / outputs) {
    float y = bias, up = 0;
    for (int w = 0; w < warps; ++w) {
      const float* const of_row = sums + (w * kColumns + row) * kTile + thread % outputs;
      y += of_row[0];
      if (paired) up += of_row[kTile / 2];
    }
    if (layer.silu) y /= 1 + __expf(-y);
    if (paired) y *= up;
    y += row == thread / outputs ? first_added : added(row);
    layer.y[row * layer.out + out] = from_float<Bfloat16>(y);
  }
}

template <int N>
void launch(const SkinnyCall& call, unsigned tiles, cudaStream_t stream) {
  const std::int64_t chunks = call.width / kChunk, passes = ceil_div(chunks, kMostWarps<N> * kInFlight<N>),
                     warps = ceil_div(chunks, kInFlight<N> * passes);
  bool normalises = false;
  for (int i = 0; i < call.layers; ++i) normalises |= call.layer[i].norm != InputNorm::none;
  const std::size_t shared = static_cast<std::size_t>(warps) * 8 * N * kTile * sizeof(float) +
                             (normalises ? static_cast<std::size_t>(call.rows * call.width) * 2 : 0);
  allow_shared_memory(forward<N>, shared);
  launch_step({dim3(tiles), static_cast<unsigned>(32 * warps), shared, stream}, forward<N>, call);
}

}  // namespace

void skinny_linear(SkinnyCall call, cudaStream_t stream) {
  unsigned tiles = 0;
  for (int i = 0; i < call.layers; ++i) {
    auto& layer = call.layer[i];
    layer.first_tile = tiles;
    tiles += static_cast<unsigned>(ceil_div(layer.out, layer.up != nullptr ? kTile / 2 : kTile));
  }
  if (tiles == 0 || call.rows == 0) return;
  if (call.rows <= 8) return launch<1>(call, tiles, stream);
  if (call.rows <= 16) return launch<2>(call, tiles, stream);
  launch<4>(call, tiles, stream);
}

}  // namespace megalodon::ops::cuda
