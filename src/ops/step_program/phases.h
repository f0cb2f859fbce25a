#pragma once
#include <cuda.h>

#include <cstdint>

#include "ops/attention_step/cuda.h"
#include "ops/cuda_barrier.h"
#include "ops/norm_cema_step/cuda.h"
#include "ops/skinny_linear/cuda.h"

// What a step program consists of, and how a block's shared memory is laid out for it.
namespace megalodon::ops::cuda::step_program {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // that compute
// A warpgroup more, of which one warp brings weights, leaves registers to those that compute.
constexpr int kProducers = 128, kFewRegisters = 56, kManyRegisters = 224;
constexpr int kMostRows = 4;  // a tensor core's product has room for 8, but then this is no faster
constexpr int kTile = kSkinnyTile;
constexpr int kChunk = 32;  // features of a warp: 8 of each thread of a row
// Weights [16, 512] of a tile: eight boxes of 64 features, or twice eight of 8 rows where it is of two
// products.
constexpr int kBlock = 64, kBlocks = 8, kStageFeatures = kBlocks * kBlock;
constexpr int kStageBytes = kTile * kStageFeatures * 2;
constexpr int kChunks = kStageFeatures / (kWarps * kChunk);  // of a warp in a stage
__host__ __device__ constexpr int whole_stages(int features) {
  return (features + kStageFeatures - 1) / kStageFeatures * kStageFeatures;
}
// Of a block. As much as hides the memory's latency: what other warps read waits behind it.
constexpr int kStagesInFlight = 2;
constexpr int kMostSums = 16 << 10;  // bytes of sums that wait for each other, about
constexpr int kSumsPitch = 20;       // of a row's sums of a tile, so that rows lie in other banks
constexpr int kSplits = 8;           // blocks that share the keys of a head
constexpr int kMostKeys = 1024;      // of a split
constexpr int kAtOnce = 4;           // keys that a thread reads before it needs the first
constexpr int kMostFeatures = 256;   // of a key

// A number that one phase hands to a later one: a bfloat16 above the run's tag, or a float32 beside it.
using Word = std::uint32_t;
using FloatWord = std::uint64_t;

// Tiles of a call that a block has; so many blocks have one more, from `first` on and around.
struct Share {
  unsigned each, more, first;
};

// What was there before the program becomes words.
struct CopyPhase {
  const Bfloat16* from;
  Word* to;
  std::int64_t count;
};

struct LinearPhase {
  SkinnyCall call;
  Share share;
  struct {
    const Word *x, *add;
    Word* y;
    int input;            // its number: layers behind each other may have the same
    unsigned same_until;  // the first tile whose input is another
  } words[kMostSkinnyLayers];
};

// What the warp that brings weights must know of a layer: its tiles are these of its call's.
struct alignas(16) LayerWeights {
  Share share;
  unsigned first_tile, end_tile;
  int width;
  int outputs;  // of a tile: fewer where each is of two products
};

// The blocks of a head of a stream, kSplits for each group of columns, write what joined is its output.
struct AttentionPhase {
  AttentionStep<Bfloat16> call;
  // Threads that share a key's features, and a group's columns, 8 each: logarithms to base 2.
  int key_shift, column_shift;
  int groups;
  int place;           // the same in all phases that have the same position, sizes and base
  FloatWord* partial;  // [B H, kSplits, dv], relative to the split's largest score
  FloatWord* moments;  // [B H, kSplits, 2]: that score and the sum of exponentials
  const Word *z, *v, *gate;
  Word* o;
};

struct NormCemaPhase {
  NormCemaStep<Bfloat16> call;
  const Word* x;
  Word *normal, *y;
};

constexpr int kPhases = 3;  // that are in shared memory
struct alignas(16) Phase {
  enum Kind : int { kCopy, kLinear, kAttention, kJoin, kNormCema } kind;
  bool waits;  // until all blocks have ended all phases before
  union {
    CopyPhase copy;
    LinearPhase linear;
    AttentionPhase attention;
    NormCemaPhase norm_cema;
  };
};

// Runs so far; blocks that wait for all others, over the phases that wait; blocks that have ended the
// program, of which the last makes these two 0 again.
struct Counters {
  unsigned runs, arrived, left;
};

// In device memory; two maps for each layer.
struct Program {
  const Phase* phases;
  const LayerWeights* layers;
  const CUtensorMap* maps;
  Counters* counters;
  int phase_count, layer_count;
};

struct Layout {
  int stages, width, rows;  // width: of the widest input
  unsigned tiles;           // whose sums are there at once
  static unsigned most_tiles(int rows) {
    return static_cast<unsigned>(kMostSums / (kWarps * rows * kSumsPitch * 4));
  }
  // Floats.
  __host__ __device__ int sums() const { return static_cast<int>(tiles) * kWarps * rows * kSumsPitch; }
  // Elements; neighbouring rows lie 16 banks apart.
  __host__ __device__ int row_pitch(int features) const { return whole_stages(features) + 32; }
  // Bytes of what a phase works on: sums, or an attention's. x stays beside it.
  __host__ __device__ int work() const {
    const int attention = kMostFeatures * 6 + kMostKeys * 4 + kThreads * 8 * 4;
    return sums() * 4 > attention ? sums() * 4 : attention;
  }
  __host__ __device__ int fixed() const {
    return kPhases * static_cast<int>(sizeof(Phase)) + work() + rows * row_pitch(width) * 2;
  }
  __host__ __device__ int bytes() const {
    return stages * (kStageBytes + 2 * static_cast<int>(sizeof(Barrier))) + fixed();
  }
};

}  // namespace megalodon::ops::cuda::step_program
