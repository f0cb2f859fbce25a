#pragma once
#include "ops/cuda_hopper.h"
#include "ops/cuda_mma.h"
#include "ops/step_program/cuda_words.h"

// Linear layers. A block makes some tiles of 16 outputs; its warps share the features. As the order of a
// sum's terms is free, weights and x agree that a thread has 8 neighbouring features: four pairs of one
// output, which are a fragment's registers as they are read. Of these the fragment's lower rows have the
// second and the fourth, so that a row of x is two columns: its first and third pairs, and its second and
// fourth.
namespace megalodon::ops::cuda::step_program {

struct alignas(16) Moments {
  float count, mean, squares;  // squares: of the distances to the mean
};

// The stages of weights in shared memory: one thread's place among them.
struct Ring {
  unsigned char* stages;
  Barrier *full, *empty;
  int count;
  int at = 0, round = 0;

  __device__ void advance() {
    if (++at == count) at = 0, ++round;
  }
};

struct Shared {
  Phase* phases;  // the present one, the next and, on its way, the one behind
  float* work;    // sums [tiles, kWarps, rows, kSumsPitch], or an attention's
  Bfloat16* x;    // [rows, pitch]
  Ring ring;

  __device__ Shared(unsigned char* memory, const Layout& layout)
      : phases(reinterpret_cast<Phase*>(memory + layout.stages * (kStageBytes + 2 * sizeof(Barrier)))),
        work(reinterpret_cast<float*>(phases + kPhases)),
        x(reinterpret_cast<Bfloat16*>(work + layout.work() / 4)),
        ring{memory, reinterpret_cast<Barrier*>(memory + layout.stages * kStageBytes),
             reinterpret_cast<Barrier*>(memory + layout.stages * kStageBytes) + layout.stages,
             layout.stages} {}
};

// A block's share of a call's tiles.
struct Tiles {
  unsigned first, end;
  __device__ explicit Tiles(const Share& share) {
    const unsigned block = blockIdx.x + (blockIdx.x < share.first ? gridDim.x : 0) - share.first;
    first = block * share.each + min(block, share.more);
    end = first + share.each + (block < share.more);
  }
};

// 16 outputs of a layer, from `first` on, or 8 of two products.
struct Tile {
  const SkinnyLayer& layer;
  int outputs, first;

  __device__ Tile(const SkinnyCall& c, unsigned index)
      : layer(c.layer[layer_of(c, index)]),
        outputs(layer.up != nullptr ? kTile / 2 : kTile),
        first(static_cast<int>(index - layer.first_tile) * outputs) {}
};

// The layer's, or no tiles behind the last one. On its way from here on, as parameters.
__device__ inline LayerWeights read_weights(const Program& program, int layer) {
  constexpr int kPacks = sizeof(LayerWeights) / 16;
  uint4 packs[kPacks] = {};
  if (layer < program.layer_count) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(packs[i].x), "=r"(packs[i].y), "=r"(packs[i].z), "=r"(packs[i].w)
                   : "l"(reinterpret_cast<const uint4*>(program.layers + layer) + i));
  }
  return *reinterpret_cast<const LayerWeights*>(packs);
}

// By a warp: all weights of the block. A lane finds the block's tiles of a layer, long before they are to be
// brought: a trip to memory between two layers would take as long as some stages.
__device__ inline void bring_weights(const Program& program, Ring ring) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ring arriving = ring;  // the oldest stage that may still be under way
  int under_way = 0;
  LayerWeights next = read_weights(program, lane);
  for (int first = 0; first < program.layer_count; first += 32) {
    const LayerWeights own = next;
    next = read_weights(program, first + 32 + lane);
    const CUtensorMap* const own_maps = program.maps + 2 * (first + lane);
    const Tiles tiles(own.share);
    const unsigned own_begin = max(tiles.first, own.first_tile), own_end = min(tiles.end, own.end_tile);
    for (unsigned left = __ballot_sync(~0u, own_begin < own_end); left != 0;) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      if (lane == __ffs(static_cast<int>(left)) - 1) {
        prefetch_map(own_maps[0]);
        if (own.outputs < kTile) prefetch_map(own_maps[1]);
      }
      const auto of_layer = [i](auto value) { return __shfl_sync(~0u, value, i); };
      const unsigned begin = of_layer(own_begin), end = of_layer(own_end),
                     first_tile = of_layer(own.first_tile);
      const int width = of_layer(own.width), outputs = of_layer(own.outputs);
      const CUtensorMap* const maps = program.maps + 2 * (first + i);
      for (unsigned tile = begin; lane == 0 && tile < end; ++tile) {
        const int row = static_cast<int>(tile - first_tile) * outputs;
        for (int block = 0; block * kBlock < width; block += kBlocks) {
          if (under_way == kStagesInFlight) {
            arriving.full[arriving.at].wait(arriving.round);
            arriving.advance();
            --under_way;
          }
          ring.empty[ring.at].wait(ring.round - 1);
          Barrier& full = ring.full[ring.at];
          unsigned char* const stage = ring.stages + ring.at * kStageBytes;
          full.arrive_expecting(kStageBytes);
          copy_tile(stage, maps[0], row, block, full);
          if (outputs < kTile) copy_tile(stage + kStageBytes / 2, maps[1], row, block, full);
          ring.advance();
          ++under_way;
        }
      }
    }
  }
}

// The rows of a layer's input, normalised, into `to` [rows, pitch], of each 8 features the first and third
// pair, then the others; zeros up to whole stages. Warps share a row where there are fewer rows than warps.
__device__ inline void read_input(const Words& words, const LinearPhase& phase, int index, Bfloat16* to,
                                  int pitch) {
  __shared__ Moments of_warp[kWarps];
  const SkinnyCall& c = phase.call;
  const SkinnyLayer& layer = c.layer[index];
  const Word* const x = phase.words[index].x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int warps = kWarps;  // of a row
  while (warps * c.rows > kWarps) warps /= 2;
  const int row = warp / warps, first = warp % warps * 32 + lane, step = 32 * warps;
  const int packs = row < c.rows ? c.width / 8 : 0;
  const int first_of_row = row * c.width;
  Bfloat16* const own = to + row * pitch;
  const auto put = [&](int i, const uint4& pack) {
    *reinterpret_cast<uint4*>(own + i * 8) = {pack.x, pack.z, pack.y, pack.w};
  };
  const auto get = [&](int i, float (&v)[8]) {
    const uint4 pack = *reinterpret_cast<const uint4*>(own + i * 8);
    unpack<Bfloat16>(uint4{pack.x, pack.z, pack.y, pack.w}, v);
  };
  for (int i = packs + first; row < c.rows && i < whole_stages(c.width) / 8; i += step) put(i, {0, 0, 0, 0});
  const bool normalises = layer.norm != InputNorm::none;
  const auto read_norm = [&](int i, float (&weight)[8], float (&bias)[8]) {
    if (layer.norm_weight != nullptr) read_parameters(layer.norm_weight + i * 8, weight);
    if (layer.norm_bias != nullptr) read_parameters(layer.norm_bias + i * 8, bias);
  };
  float weight[8] = {}, bias[8] = {}, v[8];
  if (normalises && first < packs) read_norm(first, weight, bias);
  float sum = 0, squares = 0;
  const auto read = [&](auto at_once) {
    constexpr int kAtOnce = at_once.value;
#pragma unroll 1
    for (int i = first; i < packs; i += kAtOnce * step) {
      Words::Eight found[kAtOnce];
      bool is_there = false;
      while (!is_there) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          found[u] = Words::ask_8(x + first_of_row + (i + u * step < packs ? i + u * step : i) * 8);
        is_there = true;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) is_there &= words.is_new(found[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (i + u * step >= packs) continue;
        const uint4 pack = Words::value(found[u]);
        put(i + u * step, pack);
        unpack<Bfloat16>(pack, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += v[j], squares += v[j] * v[j];
      }
    }
  };
  if (packs > step)
    read(Width<2>{});
  else
    read(Width<1>{});
  if (normalises) {
    const bool centres = layer.norm == InputNorm::layer;
    // Packs of the warp: of each round of the row's warps 32, or those that are left.
    const int of_row = c.width / 8, left = of_row % step - warp % warps * 32;
    const float count = static_cast<float>(8 * (of_row / step * 32 + max(0, min(left, 32))));
    float mean = 0;
    if (centres) {
      mean = count > 0 ? __fdividef(warp_sum(sum), count) : 0;
      squares = 0;
#pragma unroll 1
      for (int i = first; i < packs; i += step) {
        get(i, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += (v[j] - mean) * (v[j] - mean);
      }
    }
    squares = warp_sum(squares);
    if (lane == 0) of_warp[warp] = {count, mean, squares};
    sync();
    const float scale = __fdividef(1, static_cast<float>(c.width));
    Moments moments[kWarps];
    float all_mean = 0, all_squares = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) moments[i] = i < warps ? of_warp[row * warps + i] : Moments{0, 0, 0};
#pragma unroll
    for (int i = 0; i < kWarps; ++i) all_mean += moments[i].count * moments[i].mean;
    all_mean *= scale;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float distance = moments[i].mean - all_mean;
      all_squares += moments[i].squares + moments[i].count * distance * distance;
    }
    const float inverse = rsqrtf(all_squares * scale + c.eps);
#pragma unroll 1
    for (int i = first; i < packs; i += step) {
      if (i != first) read_norm(i, weight, bias);
      get(i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = (v[j] - all_mean) * inverse * (1 + weight[j]) + bias[j];
      uint4 pack;
      store(v, reinterpret_cast<Bfloat16*>(&pack));
      put(i, pack);
    }
  }
  sync();
}

// Multiplies a warp's part of some stages of a tile's weights, which begins at `place`, by x: sums of the
// tile's upper and lower outputs.
template <int kStages>
__device__ inline void multiply_stages(Ring& ring, int place, int chunk_bytes, int half_bytes,
                                       const Bfloat16* x, float (&upper)[kChunks][4],
                                       float (&lower)[kChunks][4]) {
  int slot[kStages];
  uint4 a[kStages][kChunks][2];
  uint2 b[kStages][kChunks];
#pragma unroll
  for (int u = 0; u < kStages; ++u) {
    slot[u] = ring.at;
    ring.full[ring.at].wait(ring.round);
    const unsigned char* const stage = ring.stages + ring.at * kStageBytes + place;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      b[u][i] = *reinterpret_cast<const uint2*>(x + u * kStageFeatures + i * kWarps * kChunk);
      a[u][i][0] = *reinterpret_cast<const uint4*>(stage + i * chunk_bytes);
      a[u][i][1] = *reinterpret_cast<const uint4*>(stage + i * chunk_bytes + half_bytes);
    }
    ring.advance();
  }
#pragma unroll
  for (int u = 0; u < kStages; ++u) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const auto [up, low] = a[u][i];
      multiply_add(upper[i], {up.x, up.y, up.z, up.w}, b[u][i].x, b[u][i].y);
      multiply_add(lower[i], {low.x, low.y, low.z, low.w}, b[u][i].x, b[u][i].y);
    }
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int u = 0; u < kStages; ++u) ring.empty[slot[u]].arrive();
  }
}

// What joins a sum to make an output.
class Output {
 public:
  // The output `place` of [tiles, rows, kTile] from tile `first` on; what it takes is on its way.
  __device__ Output(const Words& words, const LinearPhase& phase, unsigned first, unsigned tiles, int place)
      : words_(words), phase_(phase) {
    const SkinnyCall& c = phase.call;
    const unsigned of_row = static_cast<unsigned>(place) / kTile;
    const unsigned of_tile = c.rows == 1 ? of_row : of_row / static_cast<unsigned>(c.rows);
    is_there_ = of_tile < tiles;
    if (!is_there_) return;
    const int row = static_cast<int>(of_row - of_tile * static_cast<unsigned>(c.rows)), own = place % kTile;
    const Tile tile(c, first + of_tile);
    const int out = tile.first + own;
    is_there_ = own < tile.outputs && out < tile.layer.out;
    if (!is_there_) return;
    index_ = static_cast<int>(&tile.layer - c.layer);
    at_ = row * tile.layer.out + out;
    if (tile.layer.bias != nullptr) bias_ = read_parameter(tile.layer.bias + out);
    if (tile.layer.add != nullptr) added_ = Words::ask(phase.words[index_].add + at_);
  }
  // `sums`: of the first warp.
  __device__ void write(const float* sums, int of_warp) {
    if (!is_there_) return;
    const SkinnyLayer& layer = phase_.call.layer[index_];
    while (layer.add != nullptr && !words_.is_new(added_))
      added_ = Words::ask(phase_.words[index_].add + at_);
    const bool has_up = layer.up != nullptr;
    float y = bias_, up = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      y += sums[w * of_warp];
      if (has_up) up += sums[w * of_warp + kTile / 2];
    }
    if (layer.silu) y = __fdividef(y, 1 + __expf(-y));
    if (has_up) y *= up;
    words_.write(phase_.words[index_].y, layer.y, at_, from_float<Bfloat16>(y + Words::value(added_)));
  }

 private:
  const Words words_;
  const LinearPhase& phase_;
  int at_, index_;
  float bias_ = 0;
  Word added_ = 0;
  bool is_there_;
};

// `input`: whose numbers x holds.
__device__ inline void linear(const Words& words, const LinearPhase& phase, const Layout& layout,
                              const Shared& shared, Ring& ring, int& input) {
  const SkinnyCall& c = phase.call;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;  // row of a fragment and column of x, and place in it
  // The tile's row that is the fragment's: those that are read at once lie in other banks.
  const int of_tile = g / 2 + g % 2 * 4;
  const int in_row = ((warp % 2 * 4 + t) ^ of_tile) * 16;
  const int width = c.width, rows = c.rows, pitch = layout.row_pitch(width), of_warp = rows * kSumsPitch;
  // Columns that there are not are read as others, and not written.
  const Bfloat16* const own_x = shared.x + min(g / 2, rows - 1) * pitch + warp * kChunk + 8 * t + 4 * (g % 2);
  const Tiles tiles(phase.share);
  for (unsigned begin = tiles.first; begin < tiles.end;) {
    const auto layer = static_cast<int>(&Tile(c, begin).layer - c.layer);
    const auto& of_layer = phase.words[layer];
    const unsigned end = min(min(tiles.end, of_layer.same_until), begin + layout.tiles);
    Output output(words, phase, begin, end - begin, thread);
    if (input != of_layer.input) read_input(words, phase, layer, shared.x, pitch), input = of_layer.input;

    for (unsigned index = begin; index < end; ++index) {
      const bool has_up = Tile(c, index).layer.up != nullptr;
      const int block_bytes = (has_up ? 8 : 16) * 128, half_bytes = has_up ? kStageBytes / 2 : 8 * 128;
      const int place = warp / 2 * block_bytes + of_tile * 128 + in_row;
      float upper[kChunks][4] = {}, lower[kChunks][4] = {};
      const auto multiply = [&]<int kStages>(int first) {
        multiply_stages<kStages>(ring, place, kWarps / 2 * block_bytes, half_bytes, own_x + first, upper,
                                 lower);
      };
      int first = 0;
#pragma unroll 1
      for (; first + kStageFeatures < width; first += 2 * kStageFeatures)
        multiply.template operator()<2>(first);
      if (first < width) multiply.template operator()<1>(first);

      float* const sums = shared.work + (static_cast<int>(index - begin) * kWarps + warp) * of_warp;
      float of_upper = 0, of_lower = 0;
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        of_upper += upper[i][0] + upper[i][3], of_lower += lower[i][0] + lower[i][3];
      if (t < rows) sums[t * kSumsPitch + of_tile] = of_upper, sums[t * kSumsPitch + of_tile + 8] = of_lower;
    }
    sync();
    const auto sums_of = [&](int place) {
      return shared.work + place / kTile / rows * kWarps * of_warp + place / kTile % rows * kSumsPitch +
             place % kTile;
    };
    output.write(sums_of(thread), of_warp);
    const int places = static_cast<int>(end - begin) * rows * kTile;
#pragma unroll 1
    for (int place = thread + kThreads; place < places; place += kThreads)
      Output(words, phase, begin, end - begin, place).write(sums_of(place), of_warp);
    begin = end;
    if (begin < tiles.end) sync();
  }
}

}  // namespace megalodon::ops::cuda::step_program
