#include "ops/skinny_linear/cuda.h"

#include <numeric>

#include "ops/cuda_device.h"
#include "ops/cuda_mma.h"
#include "ops/cuda_step.h"

// Products of up to kMostKernelRows rows are the reading of their weights. A block makes 16 outputs of all
// rows, or 8 where each is of two products; its warps share the features, and each reads its weights straight
// into the registers from which the tensor cores take them: the first before x is there, others as there is
// room. As the order of a sum's terms is free, the two operands agree that a thread has 8 neighbouring
// features.
namespace megalodon::ops::cuda {
namespace {

constexpr int kTile = kSkinnyTile;
constexpr int kChunk = 32;  // features: 8 of each thread of a row

constexpr int kMostWarps = 16;
constexpr int kInFlight = 8;  // chunks of a warp
constexpr int kColumns = 8;   // of a tensor core's product: rows of x, or none
static_assert(kMostKernelRows <= kColumns);

// 8 weights, or zeros.
__device__ uint4 stream_weights(const Bfloat16* from, bool there) {
  uint4 v{0, 0, 0, 0};
  asm volatile(
      "{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %5, 0;\n\t"
      "@there ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return v;
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

__device__ void prefetch_norm(const SkinnyCall& c, const SkinnyLayer& layer) {
  if (layer.norm == InputNorm::none) return;
  for (int i = static_cast<int>(threadIdx.x) * 32; i < c.width; i += static_cast<int>(blockDim.x) * 32) {
    if (layer.norm_weight != nullptr) prefetch(layer.norm_weight + i);
    if (layer.norm_bias != nullptr) prefetch(layer.norm_bias + i);
  }
}

// In shared memory a row of x is followed by 16 bytes of nothing, so that rows lie in other banks.
__host__ __device__ int staged_width(int width) {
  return width + 8;
}

// The rows of x, normalised if need be, into shared memory; for all threads of the block.
__device__ void stage(const SkinnyCall& c, const SkinnyLayer& layer, Bfloat16* to) {
  __shared__ float2 row_moments[kMostKernelRows];
  const int width = c.width, threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  for (int row = thread / 32; layer.norm != InputNorm::none && row < c.rows; row += threads / 32) {
    const float2 m = moments(layer.x + row * width, width, layer.norm, c.eps);
    if (thread % 32 == 0) row_moments[row] = m;
  }
  __syncthreads();
  for (int row = 0; row < c.rows; ++row) {
    const Bfloat16* const x = layer.x + row * width;
    Bfloat16* const staged = to + row * staged_width(width);
    if (layer.norm == InputNorm::none) {
      for (int i = thread * 8; i < width; i += threads * 8)
        *reinterpret_cast<uint4*>(staged + i) = *reinterpret_cast<const uint4*>(x + i);
      continue;
    }
    for (int i = thread * 4; i < width; i += threads * 4) {
      float v[4], weight[4], bias[4];
      load(x + i, v);
      if (layer.norm_weight != nullptr) load(layer.norm_weight + i, weight);
      if (layer.norm_bias != nullptr) load(layer.norm_bias + i, bias);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = (v[j] - row_moments[row].x) * row_moments[row].y;
        if (layer.norm_weight != nullptr) v[j] *= 1 + weight[j];
        if (layer.norm_bias != nullptr) v[j] += bias[j];
      }
      store(v, staged + i);
    }
  }
  __syncthreads();
}

// 16 outputs of a layer, from `first` on, or 8 of two products.
struct Tile {
  const SkinnyLayer* layer;
  int outputs, first;

  __device__ Tile(const SkinnyCall& c, unsigned index) {
    layer = &c.layer[layer_of(c, index)];
    outputs = layer->up != nullptr ? kTile / 2 : kTile;
    first = static_cast<int>(index - layer->first_tile) * outputs;
  }
};

// Where a thread reads weights: chunks of a tile's rows, then those of the block's next tile.
struct Place {
  const SkinnyCall& call;
  int start, step, chunk;  // of the warp, in chunks
  unsigned tile;
  const Bfloat16 *low, *high;

  __device__ Place(const SkinnyCall& c, int start_, int step_)
      : call(c), start(start_), step(step_), chunk(start_), tile(blockIdx.x) {
    find_rows();
  }
  __device__ void go_on() {
    chunk += step;
    if (chunk * kChunk < call.width) return;
    tile += gridDim.x;
    const bool has_more = tile < call.tiles;
    chunk = has_more ? start : call.width / kChunk;
    if (has_more) find_rows();
  }
  __device__ bool has(int i) const { return (chunk + i) * kChunk < call.width; }

 private:
  __device__ void find_rows() {
    const Tile at(call, tile);
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto row = [&](const Bfloat16* weight, int out) {
      return weight + std::int64_t{min(out, at.layer->out - 1)} * call.width + 8 * t;
    };
    low = row(at.layer->weight, at.first + g);
    high =
        at.layer->up != nullptr ? row(at.layer->up, at.first + g) : row(at.layer->weight, at.first + 8 + g);
  }
};

// Sums of the warps' products become outputs. A thread's are of one feature, of several rows.
__device__ void finish(const SkinnyCall& c, const Tile& tile, const float* sums, float bias,
                       float first_added) {
  const SkinnyLayer& layer = *tile.layer;
  const int threads = static_cast<int>(blockDim.x), own = static_cast<int>(threadIdx.x) % tile.outputs,
            first_row = static_cast<int>(threadIdx.x) / tile.outputs;
  const int out = tile.first + own;
  if (out >= layer.out) return;
  for (int row = first_row; row < c.rows; row += threads / tile.outputs) {
    float y = bias, up = 0;
    for (int warp = 0; warp < threads / 32; ++warp) {
      const float* const of_row = sums + (warp * kColumns + row) * kTile + own;
      y += of_row[0];
      if (layer.up != nullptr) up += of_row[kTile / 2];
    }
    if (layer.silu) y /= 1 + __expf(-y);
    if (layer.up != nullptr) y *= up;
    if (layer.add != nullptr)
      y += row == first_row ? first_added : to_float(layer.add[row * layer.out + out]);
    layer.y[row * layer.out + out] = from_float<Bfloat16>(y);
  }
}

__global__ void __launch_bounds__(kMostWarps * 32) forward(const __grid_constant__ SkinnyCall c) {
  constexpr int P = kInFlight;
  extern __shared__ __align__(16) float sums[];  // [warps, rows, kTile], then the staged rows
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int g = lane / 4, t = lane % 4;  // row of a fragment, and place in it
  const int chunks = static_cast<int>(c.width / kChunk), step = warps * P;

  uint4 a[P][2];
  Place place(c, warp * P, step);
  const auto read_weights = [&](int i) {
    a[i][0] = stream_weights(place.low + (place.chunk + i) * kChunk, place.has(i));
    a[i][1] = stream_weights(place.high + (place.chunk + i) * kChunk, place.has(i));
  };
#pragma unroll
  for (int i = 0; i < P; ++i) read_weights(i);
  Place ahead = place;  // what does not fit into the registers yet waits in the second cache
  ahead.go_on();
#pragma unroll
  for (int i = 0; i < P; i += 2) {
    if (!ahead.has(i)) break;
    prefetch(ahead.low + (ahead.chunk + i) * kChunk), prefetch(ahead.high + (ahead.chunk + i) * kChunk);
  }
  prefetch_norm(c, *Tile(c, blockIdx.x).layer);
  wait_for_previous();

  auto* const staged_rows = reinterpret_cast<Bfloat16*>(sums + warps * kColumns * kTile);
  const SkinnyLayer* staged = nullptr;
  for (unsigned index = blockIdx.x; index < c.tiles; index += gridDim.x) {
    const Tile tile(c, index);
    const SkinnyLayer& layer = *tile.layer;
    const int out = tile.first + thread % tile.outputs, row = thread / tile.outputs;
    const bool has_output = out < layer.out;
    const float bias = layer.bias != nullptr && has_output ? layer.bias[out] : 0;
    const float added =
        layer.add != nullptr && has_output && row < c.rows ? to_float(layer.add[row * layer.out + out]) : 0;
    if (staged == nullptr || !has_same_input(*staged, layer)) {
      stage(c, layer, staged_rows);
      staged = &layer;
    }
    float sum[2][4] = {};
    for (int begin = warp * P; begin < chunks; begin += step) {
      place.go_on();
#pragma unroll
      for (int i = 0; i < P; ++i) {
        uint4 b{0, 0, 0, 0};
        if (g < c.rows && begin + i < chunks)
          b = *reinterpret_cast<const uint4*>(staged_rows + g * staged_width(c.width) + (begin + i) * kChunk +
                                              8 * t);
        multiply_add(sum[0], {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y}, b.x, b.y);
        multiply_add(sum[1], {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w}, b.z, b.w);
        read_weights(i);
      }
    }
    float* const mine = sums + warp * kColumns * kTile;
#pragma unroll
    for (int j = 0; j < 4; ++j) mine[(2 * t + j % 2) * kTile + g + j / 2 * 8] = sum[0][j] + sum[1][j];
    __syncthreads();
    finish(c, tile, sums, bias, added);
    __syncthreads();
  }
}

// V neighbouring outputs of a row a thread.
template <int V>
__global__ void __launch_bounds__(256) finish_sums(const __grid_constant__ FinishCall c) {
  const unsigned pack = blockIdx.x * blockDim.x + threadIdx.x;
  if (pack >= c.packs) return;
  int i = 0;
  while (i + 1 < c.layers && pack >= c.layer[i + 1].first_pack) ++i;
  const ProductSums& layer = c.layer[i];
  const int out = static_cast<int>(pack - layer.first_pack) * V;
  const std::int64_t row = blockIdx.y, at = row * layer.out + out;
  float y[V], bias[V] = {}, up[V], added[V] = {};
  if (layer.bias != nullptr) load(layer.bias + out, bias);
  wait_for_previous();
  load(layer.sums + row * layer.pitch + out, y);
  if (layer.up != nullptr) load(layer.up + row * layer.up_pitch + out, up);
  if (layer.add != nullptr) load(layer.add + at, added);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    y[j] += bias[j];
    if (layer.silu) y[j] /= 1 + __expf(-y[j]);
    if (layer.up != nullptr) y[j] *= up[j];
    y[j] += added[j];
  }
  store(y, layer.y + at);
}

}  // namespace

void skinny_linear(SkinnyCall call, cudaStream_t stream) {
  place_tiles(call);
  if (call.tiles == 0 || call.rows == 0) return;
  const std::int64_t chunks = call.width / kChunk, passes = ceil_div(chunks, kMostWarps * kInFlight),
                     warps = ceil_div(chunks, kInFlight * passes);
  const auto threads = static_cast<unsigned>(32 * warps);
  const std::size_t shared = static_cast<std::size_t>(warps) * kColumns * kTile * sizeof(float) +
                             static_cast<std::size_t>(call.rows * staged_width(call.width)) * 2;
  allow_shared_memory(forward, shared);
  const dim3 grid(grid_size(call.tiles, resident_blocks(forward, threads, shared)));
  launch_step({grid, threads, shared, stream}, forward, call);
}

void finish_products(FinishCall call, cudaStream_t stream) {
  std::int64_t common = 4;
  for (int i = 0; i < call.layers; ++i) {
    const auto& layer = call.layer[i];
    common = std::gcd(common, std::gcd(std::int64_t{layer.out}, std::gcd(layer.pitch, layer.up_pitch)));
  }
  const int V = common == 4 ? 4 : 1;
  call.packs = 0;
  for (int i = 0; i < call.layers; ++i) {
    call.layer[i].first_pack = call.packs;
    call.packs += static_cast<unsigned>(call.layer[i].out / V);
  }
  if (call.packs == 0 || call.rows == 0) return;
  const StepLaunch launch{dim3(grid_size(ceil_div(call.packs, 256)), static_cast<unsigned>(call.rows)), 256,
                          0, stream};
  V == 4 ? launch_step(launch, finish_sums<4>, call) : launch_step(launch, finish_sums<1>, call);
}

}  // namespace megalodon::ops::cuda
