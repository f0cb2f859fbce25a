#include <algorithm>
#include <numeric>

#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_step.h"
#include "ops/cuda_tensor_map.h"
#include "ops/skinny_linear/cuda.h"

// Products of up to 32 rows are the reading of their weights too, but x is too large for registers. A block
// makes 128 outputs of all rows, or 64 where each is of two products, of a part of the features; the blocks
// of a cluster share the features and join their sums. Weights and x come into a ring of stages, each by a
// thread of its own; two warpgroups multiply, the weights as the left operand. Weights do not depend on the
// kernel before: as many of them as there are stages come while that one runs.
namespace megalodon::ops::cuda {
namespace {

constexpr int kRows = kMostSkinnyRows;
constexpr int kDepth = 64;            // features of a stage
constexpr int kBox = 64, kBoxes = 2;  // outputs of a warpgroup, warpgroups
constexpr int kTileOutputs = kBox * kBoxes;
constexpr int kStages = 5;     // so that two blocks share a multiprocessor, of two kernels too
constexpr int kMostSplit = 8;  // blocks of a cluster
constexpr int kWorkers = 128 * kBoxes, kOfWeights = kWorkers, kOfX = kWorkers + 32, kThreads = kOfX + 32;

struct Stage {
  Bfloat16 weight[kBoxes][kBox][kDepth], x[kRows][kDepth];
};
static_assert(sizeof(Stage) % 1024 == 0);
// Of a block, where the stages were; rows lie so that a warp's stores are in different banks.
using Sums = float[kRows][kTileOutputs + 4];
static_assert(sizeof(Sums) <= kStages * sizeof(Stage));

struct Shared {
  Stage stage[kStages];
  Barrier weights[kStages], x[kStages], empty[kStages];
};
constexpr std::size_t kSharedBytes = sizeof(Shared) + 1024;  // the stages begin at a multiple of 1024

struct WideCall {
  CUtensorMap x[kMostSkinnyLayers], weight[kMostSkinnyLayers], up[kMostSkinnyLayers];
  SkinnyCall call;
};

// The block's outputs and its part of the features.
struct Part {
  int index;  // of the layer
  int first, outputs;
  int begin, count;  // stages

  __device__ explicit Part(const SkinnyCall& c) : index(0) {
    while (index + 1 < c.layers && blockIdx.x >= c.layer[index + 1].first_tile) ++index;
    outputs = c.layer[index].up != nullptr ? kTileOutputs / 2 : kTileOutputs;
    first = static_cast<int>(blockIdx.x - c.layer[index].first_tile) * outputs;
    const int all = (c.width + kDepth - 1) / kDepth, rank = static_cast<int>(blockIdx.z),
              split = static_cast<int>(gridDim.z);
    begin = all * rank / split, count = all * (rank + 1) / split - begin;
  }
  __device__ int column(int i) const { return (begin + i) * kDepth; }
};

// Until the products of stage i's predecessor in the ring have been made.
__device__ void wait_for_room(Shared& shared, int i) {
  if (i >= kStages) shared.empty[i % kStages].wait(i / kStages - 1);
}
__device__ void copy_weights(const WideCall& c, const Part& part, Shared& shared) {
  const bool has_up = part.outputs == kBox;
  const CUtensorMap* const weight[kBoxes] = {&c.weight[part.index],
                                             has_up ? &c.up[part.index] : &c.weight[part.index]};
  const int row[kBoxes] = {part.first, has_up ? part.first : part.first + kBox};
  for (int i = 0; i < part.count; ++i) {
    wait_for_room(shared, i);
    Stage& to = shared.stage[i % kStages];
    Barrier& there = shared.weights[i % kStages];
    there.arrive_expecting(sizeof(to.weight));
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) copy_box(to.weight[b], *weight[b], part.column(i), row[b], 0, there);
  }
}
__device__ void copy_x(const WideCall& c, const Part& part, Shared& shared) {
  for (int i = 0; i < part.count; ++i) {
    wait_for_room(shared, i);
    Stage& to = shared.stage[i % kStages];
    Barrier& there = shared.x[i % kStages];
    there.arrive_expecting(sizeof(to.x));
    copy_box(to.x, c.x[part.index], part.column(i), 0, 0, there);
  }
}

// The products of a warpgroup's weights with x: outputs 16 w + l / 4 (+ 8 for every second pair) of warp w
// and lane l, rows 8 j + l % 4 * 2 (+ 1).
__device__ void multiply_stages(const Part& part, Shared& shared, float (&sums)[kRows / 2]) {
  const int box = static_cast<int>(threadIdx.x) / 128;
  const bool releases = threadIdx.x % 32 == 0;
  for (int i = 0; i < part.count; ++i) {
    const Stage& stage = shared.stage[i % kStages];
    shared.weights[i % kStages].wait(i / kStages);
    shared.x[i % kStages].wait(i / kStages);
    products_begin();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step)
      multiply<false, false>(sums, operand<false>(stage.weight[box], step), operand<false>(stage.x, step),
                             i > 0 || step > 0);
    products_commit();
    products_wait<1>();
    if (releases && i > 0) shared.empty[(i - 1) % kStages].arrive();
  }
  products_wait<0>();
}

// V numbers of a block of the cluster, where they lie in each.
template <int V>
__device__ void read_of_cluster(const float* mine, unsigned block, float (&to)[V]) {
  const std::uint32_t remote = address_in_block(mine, block);
  if constexpr (V == 4) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(remote)
                 : "memory");
  } else {
    static_assert(V == 1);
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(to[0]) : "r"(remote) : "memory");
  }
}

// The cluster's sums become outputs, V neighbouring ones of a row at once, by the cluster's workers.
template <int V>
class Finish {
 public:
  struct Operands {
    float bias[V] = {}, added[V] = {};
  };

  __device__ Finish(const SkinnyCall& c, const Part& part, Sums& sums)
      : layer_(c.layer[part.index]), part_(part), sums_(sums), rows_(c.rows) {}

  __device__ void prefetch_bias() const {
    const int out = part_.first + static_cast<int>(threadIdx.x) * 32;  // lines of 32 numbers
    if (layer_.bias != nullptr && out < min(part_.first + part_.outputs, layer_.out))
      prefetch(layer_.bias + out);
  }
  // What a thread has of multiply_stages.
  __device__ void put(const float (&sums)[kRows / 2]) const {
    const int thread = static_cast<int>(threadIdx.x), out = thread / 32 * 16 + thread % 32 / 4,
              row = thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sums_[i / 4 * 8 + row + i % 2][out + i / 2 % 2 * 8] = sums[i];
  }
  // What stands behind the products of a thread's first outputs, to be on its way meanwhile.
  __device__ Operands first_operands() const { return read(first_item()); }
  __device__ void run(Operands next) const {
    for (int item = first_item(); has(item); item += kWorkers * static_cast<int>(gridDim.z)) {
      const Operands now = next;
      next = read(item + kWorkers * static_cast<int>(gridDim.z));
      write(item, now);
    }
  }

 private:
  __device__ static int first_item() {
    return kWorkers * static_cast<int>(blockIdx.z) + static_cast<int>(threadIdx.x);
  }
  __device__ int row(int item) const { return item * V / part_.outputs; }
  __device__ int column(int item) const { return item * V % part_.outputs; }
  __device__ bool has(int item) const { return row(item) < rows_; }
  __device__ int out(int item) const { return part_.first + column(item); }
  __device__ int at(int item) const { return row(item) * layer_.out + out(item); }

  __device__ Operands read(int item) const {
    Operands o;
    if (!has(item) || out(item) >= layer_.out) return o;
    if (layer_.bias != nullptr) load(layer_.bias + out(item), o.bias);
    if (layer_.add != nullptr) load(layer_.add + at(item), o.added);
    return o;
  }
  __device__ void sum(const float* from, float (&to)[V]) const {
    float of_block[kMostSplit][V];
#pragma unroll
    for (unsigned k = 0; k < kMostSplit; ++k)
      if (k < gridDim.z) read_of_cluster(from, k, of_block[k]);
#pragma unroll
    for (unsigned k = 0; k < kMostSplit; ++k) {
      if (k >= gridDim.z) break;
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] += of_block[k][j];
    }
  }
  __device__ void write(int item, const Operands& o) const {
    if (out(item) >= layer_.out) return;
    const float* const of_item = sums_[row(item)] + column(item);
    float y[V], up[V] = {};
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = o.bias[j];
    sum(of_item, y);
    if (layer_.up != nullptr) sum(of_item + kBox, up);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (layer_.silu) y[j] /= 1 + __expf(-y[j]);
      if (layer_.up != nullptr) y[j] *= up[j];
      y[j] += o.added[j];
    }
    store(y, layer_.y + at(item));
  }

  const SkinnyLayer& layer_;
  const Part& part_;
  Sums& sums_;
  int rows_;
};

template <int V>
__global__ void __launch_bounds__(kThreads, 2) products(const __grid_constant__ WideCall c) {
  if constexpr (kForHopper) {
    extern __shared__ char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
    const Part part(c.call);
    const Finish<V> finish(c.call, part, *reinterpret_cast<Sums*>(shared.stage));
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == kOfX) {
      for (int i = 0; i < kStages; ++i)
        shared.weights[i].start(1), shared.x[i].start(1), shared.empty[i].start(kWorkers / 32);
      barriers_are_started();
      prefetch_map(c.x[part.index]);
    }
    finish.prefetch_bias();
    __syncthreads();

    if (thread == kOfWeights) copy_weights(c, part, shared);
    wait_for_previous();
    if (thread == kOfX) copy_x(c, part, shared);
    if (thread < kWorkers) {
      const auto operands = finish.first_operands();
      float sums[kRows / 2];
      multiply_stages(part, shared, sums);
      named_wait(1, kWorkers);  // the stages are not read any more
      finish.put(sums);
      cluster_sync();
      finish.run(operands);
    } else {
      cluster_sync();
    }
    cluster_sync();  // until the others have read this block's sums
  }
}

// A matrix [rows, width] for copies of boxes of `box_rows` rows and kDepth columns.
CUtensorMap matrix_map(const Bfloat16* matrix, std::int64_t rows, std::int64_t width, int box_rows) {
  return tensor_map("skinny_linear", matrix,
                    {.sizes = {width, rows, 1},
                     .strides = {width, width * rows},
                     .box = {kDepth, box_rows, 1},
                     .swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

}  // namespace

bool has_wide_products() {
  return has_hopper_code();
}

void wide_products(SkinnyCall call, cudaStream_t stream) {
  place_tiles(call, kTileOutputs);
  if (call.tiles == 0 || call.rows == 0) return;
  WideCall wide{};
  int common = 4;  // divides all widths of outputs
  for (int i = 0; i < call.layers; ++i) {
    const auto& layer = call.layer[i];
    common = std::gcd(common, layer.out);
    if (layer.out == 0) continue;
    wide.x[i] = matrix_map(layer.x, call.rows, call.width, kRows);
    wide.weight[i] = matrix_map(layer.weight, layer.out, call.width, kBox);
    if (layer.up != nullptr) wide.up[i] = matrix_map(layer.up, layer.out, call.width, kBox);
  }
  wide.call = call;
  // About a block for each multiprocessor.
  const int processors = static_cast<int>(multiprocessors()), tiles = static_cast<int>(call.tiles),
            stages = (call.width + kDepth - 1) / kDepth;
  const int split = std::clamp((processors + tiles / 2) / tiles, 1, std::min(kMostSplit, stages));
  const auto kernel = common == 4 ? products<4> : products<1>;
  allow_shared_memory(kernel, kSharedBytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
  const auto cluster = static_cast<unsigned>(split);
  launch_step({dim3(call.tiles, 1, cluster), kThreads, kSharedBytes, stream, cluster}, kernel, wide);
}

}  // namespace megalodon::ops::cuda
