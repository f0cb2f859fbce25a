#include <algorithm>
#include <utility>

#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_step.h"
#include "ops/cuda_tensor_map.h"
#include "ops/skinny_linear/cuda.h"

// Products of up to 32 rows are the reading of their weights too, but x is too large for registers. A block
// makes 128 outputs of all rows, or 64 where each is of two products, of a part of the features; the blocks
// of a cluster share the features. Weights and x come in stages, into a ring each, asked for by a thread
// each; two warpgroups multiply, the weights as the left operand. Weights do not depend on the kernel before:
// as many stages of them as there is room for come while that one runs. Each block finishes some of the rows:
// the others send it their sums of them, straight from their registers.
namespace megalodon::ops::cuda {
namespace {

constexpr int kRows = kMostSkinnyRows;
constexpr int kDepth = 64;            // features of a stage
constexpr int kBox = 64, kBoxes = 2;  // outputs of a warpgroup, warpgroups
constexpr int kTileOutputs = kBox * kBoxes;
constexpr int kMostSplit = 8;  // blocks of a cluster
constexpr int kWorkers = 128 * kBoxes, kOfWeights = kWorkers, kOfX = kWorkers + 32, kThreads = kOfX + 32;

// Sums of four rows.
constexpr int kQuad = 4, kQuads = kRows / kQuad;
using QuadSums = float[kTileOutputs][kQuad];

// Barriers of a ring: of stage i those of its slot.
template <int kSlots>
struct Ring {
  Barrier there[kSlots], empty[kSlots];

  __device__ void start() {
    for (int i = 0; i < kSlots; ++i) there[i].start(1), empty[i].start(kWorkers / 32);
  }
  __device__ void wait_for_room(int i) {
    if (i >= kSlots) empty[i % kSlots].wait(i / kSlots - 1);
  }
  __device__ void wait(int i) { there[i % kSlots].wait(i / kSlots); }
  __device__ void release(int i) { empty[i % kSlots].arrive(); }
};

constexpr int kWeightSlots = 5, kXSlots = 8;
struct Shared {
  union {
    Bfloat16 weight[kWeightSlots][kBoxes][kBox][kDepth];
    QuadSums sums[kWeightSlots * kQuads];
  };
  Bfloat16 x[kXSlots][kRows][kDepth];
  Ring<kWeightSlots> weights;
  Ring<kXSlots> xs;
  Barrier sums_are_there;
};
static_assert(sizeof(QuadSums) * kQuads * kWeightSlots == sizeof(Shared::weight));
// Two blocks share a multiprocessor, of two kernels too: of its 228 KB the system takes 1 KB for each.
static_assert(sizeof(Shared) <= (228 / 2 - 1) * 1024);

struct WideCall {
  CUtensorMap x[kMostSkinnyLayers], weight[kMostSkinnyLayers], up[kMostSkinnyLayers];
  SkinnyCall call;
  int stages, more;  // of a block of the cluster; blocks, the first, that have one more
};

// The block's outputs and its part of the features.
struct Part {
  int index;  // of the layer
  int first, outputs;
  int rank, begin, count;  // in the cluster; stages

  __device__ explicit Part(const WideCall& c) : index(0), rank(static_cast<int>(blockIdx.z)) {
    while (index + 1 < c.call.layers && blockIdx.x >= c.call.layer[index + 1].first_tile) ++index;
    const SkinnyLayer& layer = c.call.layer[index];
    outputs = layer.up != nullptr ? kTileOutputs / 2 : kTileOutputs;
    first = static_cast<int>(blockIdx.x - layer.first_tile) * outputs;
    begin = rank * c.stages + min(rank, c.more), count = count_of(c, rank);
  }
  __device__ static int count_of(const WideCall& c, int block) { return c.stages + (block < c.more); }
};

__device__ void copy_weights(const WideCall& c, const Part& part, Shared& shared) {
  const bool has_up = part.outputs == kBox;
  const CUtensorMap* const weight[kBoxes] = {&c.weight[part.index],
                                             has_up ? &c.up[part.index] : &c.weight[part.index]};
  const int row[kBoxes] = {part.first, has_up ? part.first : part.first + kBox};
#pragma unroll 1
  for (int i = 0; i < part.count; ++i) {
    shared.weights.wait_for_room(i);
    auto& to = shared.weight[i % kWeightSlots];
    Barrier& there = shared.weights.there[i % kWeightSlots];
    there.arrive_expecting(sizeof(to));
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) copy_box(to[b], *weight[b], (part.begin + i) * kDepth, row[b], 0, there);
  }
}
__device__ void copy_x(const WideCall& c, const Part& part, Shared& shared) {
#pragma unroll 1
  for (int i = 0; i < part.count; ++i) {
    shared.xs.wait_for_room(i);
    auto& to = shared.x[i % kXSlots];
    Barrier& there = shared.xs.there[i % kXSlots];
    there.arrive_expecting(sizeof(to));
    copy_box(to, c.x[part.index], (part.begin + i) * kDepth, 0, 0, there);
  }
}

// The products of a warpgroup's weights with x: outputs 16 w + l / 4 (+ 8 for every second pair) of warp w
// and lane l, rows 8 j + l % 4 * 2 (+ 1). Arrives at the cluster's barrier when sums may come.
__device__ void multiply_stages(int count, Shared& shared, float (&sums)[kRows / 2]) {
  const int box = static_cast<int>(threadIdx.x) / 128;
  const bool releases = threadIdx.x % 32 == 0;
  const int last_in_their_way = max(count - kWeightSlots + 1, -1);
  for (int i = 0; i < count; ++i) {
    shared.weights.wait(i), shared.xs.wait(i);
    const auto weight = operand<false>(shared.weight[i % kWeightSlots][box], 0),
               x = operand<false>(shared.x[i % kXSlots], 0);
    products_begin();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step)  // of 32 bytes, in units of 16
      multiply<false, false>(sums, weight + 2 * step, x + 2 * step, i > 0 || step > 0);
    products_commit();
    products_wait<1>();
    if (releases && i > 0) shared.weights.release(i - 1), shared.xs.release(i - 1);
    if (i - 1 == last_in_their_way) cluster_arrive_relaxed();
  }
  products_wait<0>();
}

// The cluster's sums become outputs, four rows of an output at once. Block b finishes every kSplit-th four
// rows from the b-th on; a piece of what arrives there is of a block and four rows.
template <int kSplit>
class Finish {
 public:
  __device__ Finish(const WideCall& c, const Part& part, Shared& shared)
      : call_(c), layer_(c.call.layer[part.index]), part_(part), shared_(shared) {
    const unsigned thread = threadIdx.x;
    const bool has_up = layer_.up != nullptr;
    column_ = static_cast<int>(has_up ? thread % kBox : thread % kTileOutputs);
    first_quad_ = part.rank + static_cast<int>(has_up ? thread / kBox : thread / kTileOutputs) * kSplit;
    step_ = kSplit * (has_up ? kWorkers / kBox : kAtOnce);
    out_ = part.first + column_;
    rows_ = out_ < layer_.out ? c.call.rows : 0;
    if (layer_.bias != nullptr && rows_ > 0) bias_ = layer_.bias[out_];
  }

  // By one thread. A block by itself has workers that put their sums down, others expect that sums are sent.
  __device__ void start() const { shared_.sums_are_there.start(kSplit == 1 ? kWorkers : 1); }
  __device__ void expect() const {
    if constexpr (kSplit == 1) return;
    int pieces = 0;
    for (int quad = part_.rank; quad * kQuad < call_.call.rows; quad += kSplit) pieces += kSplit;
    shared_.sums_are_there.arrive_expecting(pieces * static_cast<int>(sizeof(QuadSums)));
  }
  // What is added to a thread's outputs, to be on its way meanwhile.
  __device__ void read() {
    if (layer_.add == nullptr) return;
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j)
        if (has(item, j)) added_[item][j] = layer_.add[at(item, j)];
    }
  }
  // What a thread has of multiply_stages.
  __device__ void send(const float (&sums)[kRows / 2]) const {
    const unsigned thread = threadIdx.x, out = thread / 32 * 16 + thread % 32 / 4, row = thread % 4 * 2;
#pragma unroll
    for (unsigned j = 0; j < kRows / 8; ++j) {
      const unsigned quad = (8 * j + row) / kQuad, block = quad % kSplit;
      if (static_cast<int>(quad * kQuad) >= call_.call.rows) break;
      auto& piece = arriving(Part::count_of(call_, static_cast<int>(block)),
                             static_cast<int>(quad - block) + part_.rank);
      float* const own = &piece[out][row % kQuad];
      if constexpr (kSplit == 1) {
        *reinterpret_cast<float2*>(own) = {sums[4 * j], sums[4 * j + 1]};
        *reinterpret_cast<float2*>(own + 8 * kQuad) = {sums[4 * j + 2], sums[4 * j + 3]};
      } else {
        const auto to = address_in_block(own, block),
                   barrier = address_in_block(&shared_.sums_are_there, block);
        send_to_block(to, sums[4 * j], sums[4 * j + 1], barrier);
        send_to_block(to + 8 * sizeof(piece[0]), sums[4 * j + 2], sums[4 * j + 3], barrier);
      }
    }
    if constexpr (kSplit == 1) shared_.sums_are_there.arrive();
  }
  __device__ void run() const {
    shared_.sums_are_there.wait(0);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (!has(item, 0)) break;
      float y[kQuad], up[kQuad] = {};
#pragma unroll
      for (int j = 0; j < kQuad; ++j) y[j] = bias_;
      sum(item, column_, y);
      if (layer_.up != nullptr) sum(item, column_ + kBox, up);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (layer_.silu) y[j] = __fdividef(y[j], 1 + __expf(-y[j]));
        if (layer_.up != nullptr) y[j] *= up[j];
        if (layer_.add != nullptr) y[j] += to_float(kept_until_here(added_[item][j]));
        if (has(item, j)) layer_.y[at(item, j)] = from_float<Bfloat16>(y[j]);
      }
    }
  }

 private:
  static constexpr int kPieces = (kQuads + kSplit - 1) / kSplit * kSplit;  // the most of a block
  static constexpr int kAtOnce = kWorkers / kTileOutputs, kItems = (kPieces / kSplit + kAtOnce - 1) / kAtOnce;

  // In a block of `count` stages: in the slots of its last but four stages and the next.
  __device__ QuadSums& arriving(int count, int piece) const {
    constexpr int kPlaces = kWeightSlots * kQuads;
    const int i = count % kWeightSlots * kQuads + piece;
    return shared_.sums[kPieces > kQuads && i >= kPlaces ? i - kPlaces : i];
  }
  __device__ void sum(int item, int column, float (&to)[kQuad]) const {
    float of_block[kSplit][kQuad];
#pragma unroll
    for (int k = 0; k < kSplit; ++k)
      load(arriving(part_.count, first_quad_ - part_.rank + item * step_ + k)[column], of_block[k]);
#pragma unroll
    for (int k = 0; k < kSplit; ++k) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) to[j] += of_block[k][j];
    }
  }
  // The compiler converts it no earlier, which would be a wait for the read.
  __device__ static Bfloat16 kept_until_here(Bfloat16 x) {
    asm volatile("" : "+h"(x.bits));
    return x;
  }
  __device__ int row(int item, int j) const { return (first_quad_ + item * step_) * kQuad + j; }
  __device__ bool has(int item, int j) const { return row(item, j) < rows_; }
  __device__ int at(int item, int j) const { return row(item, j) * layer_.out + out_; }

  const WideCall& call_;
  const SkinnyLayer layer_;
  const Part& part_;
  Shared& shared_;
  int column_, out_, first_quad_, step_;
  int rows_;  // none where the thread has no output
  float bias_ = 0;
  Bfloat16 added_[kItems][kQuad] = {};
};

template <int kSplit>
__global__ void __launch_bounds__(kThreads, 2) products(const __grid_constant__ WideCall c) {
  if constexpr (kForHopper) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Part part(c);
    Finish<kSplit> finish(c, part, shared);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == kOfX) {
      shared.weights.start(), shared.xs.start(), finish.start();
      barriers_are_started();
      finish.expect();
      prefetch_map(c.x[part.index]);
    }
    __syncthreads();
    if (thread >= kWorkers) cluster_arrive_relaxed();

    if (thread == kOfWeights) copy_weights(c, part, shared);
    wait_for_previous();
    if (thread == kOfX) copy_x(c, part, shared);
    if (thread < kWorkers) {
      finish.read();
      float sums[kRows / 2];
      multiply_stages(part.count, shared, sums);
      cluster_wait();  // until there is room for this block's sums
      finish.send(sums);
      finish.run();
    } else {
      cluster_wait();
    }
  }
}

// By the blocks of a cluster.
template <int... kSplits>
auto products_of(std::integer_sequence<int, kSplits...>, int split) {
  constexpr void (*kKernels[])(WideCall) = {products<kSplits + 1>...};
  return kKernels[split - 1];
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
  for (int i = 0; i < call.layers; ++i) {
    const auto& layer = call.layer[i];
    if (layer.out == 0) continue;
    wide.x[i] = matrix_map(layer.x, call.rows, call.width, kRows);
    wide.weight[i] = matrix_map(layer.weight, layer.out, call.width, kBox);
    if (layer.up != nullptr) wide.up[i] = matrix_map(layer.up, layer.out, call.width, kBox);
  }
  wide.call = call;
  // A block for each multiprocessor, or some more.
  const int stages = static_cast<int>(ceil_div(call.width, kDepth)),
            split = std::min({static_cast<int>(ceil_div(multiprocessors(), call.tiles)), kMostSplit, stages});
  wide.stages = stages / split, wide.more = stages % split;
  const auto kernel = products_of(std::make_integer_sequence<int, kMostSplit>{}, split);
  allow_all_shared_memory(kernel, sizeof(Shared));
  const auto cluster = static_cast<unsigned>(split);
  launch_step({dim3(call.tiles, 1, cluster), kThreads, sizeof(Shared), stream, cluster}, kernel, wide);
}

}  // namespace megalodon::ops::cuda
