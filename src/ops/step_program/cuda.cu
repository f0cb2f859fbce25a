#include "ops/step_program/cuda.h"

#include <cuda_pipeline.h>

#include <algorithm>

#include "ops/cuda_tensor_map.h"
#include "ops/step_program/cuda_items.h"
#include "ops/step_program/cuda_linear.h"
#include "ops/step_program/handover.h"
#include "ops/step_program/order.h"

// Decoding reads all weights once, in kernels so short that starting and ending them takes as long. Here a
// block stays on each multiprocessor for the whole program. One of its warps has the copy engine bring the
// block's weights of all phases into a ring in shared memory, in their order and as far ahead as there is
// room; the others use them. No block waits for all others to end a phase: what phases hand over lies in
// words that carry the number of the run beside the value, and who reads one waits until that is there.
namespace megalodon::ops::cuda {
using namespace step_program;
namespace {

// By a warp: what the block will take of a phase besides weights and what other phases make.
__device__ void prefetch_phase(const Phase& phase, Attention::Position& position) {
  const int item = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % 32;
  if (phase.kind == Phase::kLinear) {
    const SkinnyCall& c = phase.linear.call;
    const Tiles tiles(phase.linear.share);
    if (tiles.first == tiles.end) return;
    const Tile tile(c, tiles.first);
    const SkinnyLayer& layer = tile.layer;
#pragma unroll 1
    for (int i = lane * 32; layer.norm != InputNorm::none && i < c.width; i += 32 * 32) {
      if (layer.norm_weight != nullptr) prefetch(layer.norm_weight + i);
      if (layer.norm_bias != nullptr) prefetch(layer.norm_bias + i);
    }
    const int out = tile.first + lane * 32;
    if (layer.bias != nullptr && out < layer.out && lane < 8) prefetch(layer.bias + out);
  } else if (phase.kind == Phase::kAttention) {
    if (item < Attention::items(phase.attention)) Attention::prefetch(phase.attention, item, position);
  } else if (phase.kind == Phase::kNormCema) {
    if (item < NormCema::items(phase.norm_cema)) NormCema::prefetch(phase.norm_cema, item);
  }
}
// By a warp, for all phases, two phases ahead of the block.
__device__ void prefetch_phases(const Program& program, int* present) {
  Attention::Position position;
  for (int p = 1; p < program.phase_count; ++p) {
    while (atomicAdd_block(present, 0) + 2 < p) __nanosleep(100);
    prefetch_phase(program.phases[p], position);
  }
}

// Until `arrivals` blocks have called it.
__device__ void wait_for_all(Counters* counters, unsigned arrivals) {
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&counters->arrived) : "memory");
    unsigned arrived = 0;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(arrived)
                   : "l"(&counters->arrived)
                   : "memory");
    } while (arrived < arrivals);
  }
  sync();
}

__device__ void copy(const Words& words, const CopyPhase& phase) {
  const auto first = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  for (std::int64_t i = first; i < phase.count; i += static_cast<int>(gridDim.x) * kThreads)
    words.write(phase.to, nullptr, i, phase.from[i]);
}

__global__ void __launch_bounds__(kThreads + kProducers, 1) run(const Program program, const Layout layout) {
  if constexpr (kForHopper) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ int present;  // phase
    const Shared shared(memory, layout);
    const int thread = static_cast<int>(threadIdx.x);
    const auto copy_phase = [&](int p) {
      constexpr int kPacks = sizeof(Phase) / 16;
      if (p < program.phase_count && thread < kPacks)
        __pipeline_memcpy_async(reinterpret_cast<uint4*>(shared.phases + p % kPhases) + thread,
                                reinterpret_cast<const uint4*>(program.phases + p) + thread, 16);
    };
    if (thread == 0) {
      for (int i = 0; i < layout.stages; ++i)
        shared.ring.full[i].start(1), shared.ring.empty[i].start(kWarps);
      barriers_are_started();
      present = 0;
    }
    copy_phase(0), copy_phase(1);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    if (thread >= kThreads) {
      give_registers<kFewRegisters>();
      if (thread < kThreads + 32) bring_weights(program, shared.ring);
      if (thread >= kThreads + 32 && thread < kThreads + 64) prefetch_phases(program, &present);
      return;
    }

    take_registers<kManyRegisters>();
    Ring ring = shared.ring;
    const Words words(__ldcg(&program.counters->runs) + 1);
    Attention::Place place;
    unsigned waits = 0;
    int input = -1;
    for (int p = 0; p < program.phase_count; ++p) {
      const Phase& phase = shared.phases[p % kPhases];
      copy_phase(p + 2);
      __pipeline_commit();
      if (thread == 0) atomicExch_block(&present, p);
      if (phase.waits) wait_for_all(program.counters, ++waits * gridDim.x);
      switch (phase.kind) {
        case Phase::kCopy:
          copy(words, phase.copy);
          break;
        case Phase::kLinear:
          linear(words, phase.linear, layout, shared, ring, input);
          break;
        case Phase::kAttention:
          do_items(Attention(words, phase.attention, shared.work, place), Attention::items(phase.attention));
          break;
        case Phase::kJoin:
          do_items(Join(words, phase.attention), Join::items(phase.attention));
          break;
        case Phase::kNormCema:
          do_items(NormCema(words, phase.norm_cema), NormCema::items(phase.norm_cema));
          break;
      }
      __pipeline_wait_prior(1);  // the next phase is there
      sync();
    }
    if (thread == 0 && atomicAdd(&program.counters->left, 1) == gridDim.x - 1)
      ++program.counters->runs, program.counters->arrived = 0, program.counters->left = 0;
  }
}

bool takes_call(const SkinnyCall& c) {
  return c.layers > 0 && c.rows > 0 && c.rows <= kMostRows && c.width % kBlock == 0 && c.width <= 8192 &&
         c.rows * c.width <= 32768;
}
bool takes_call(const AttentionStep<Bfloat16>& a) {
  return a.B > 0 && a.B <= kMostRows && a.dz <= kMostFeatures && a.dz % 8 == 0 && a.dv % 8 == 0 &&
         a.chunk <= kSplits * kMostKeys && a.C * a.H * std::max(a.dz, a.dv) < (1LL << 31);
}
bool takes_call(const NormCemaStep<Bfloat16>& a) {
  return a.B > 0 && a.B <= kMostRows && a.D / a.G * lanes_of(a.N) <= kThreads;
}

// Weights [out, width] in blocks of 64 features: boxes of some rows of a stage's blocks.
CUtensorMap map_of(const Bfloat16* weights, int out, int width, int rows) {
  return tensor_map("skinny_linear", weights,
                    {.sizes = {kBlock, out, width / kBlock},
                     .strides = {width, kBlock},
                     .box = {kBlock, rows, kBlocks},
                     .swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

thread_local StepRecorder* recorder = nullptr;

}  // namespace

bool StepProgram::takes(const StepCall& call) {
  return has_hopper_code() && std::visit([](const auto& c) { return takes_call(c); }, call);
}

StepProgram::StepProgram(std::vector<StepCall> calls) : calls_(std::move(calls)) {
  const Handover handover(calls_);
  words_ = static_cast<std::size_t>(handover.words()), phases_ = handover.copies().size();
  for (const auto& call : calls_) {
    ++phases_;
    if (const auto* c = std::get_if<SkinnyCall>(&call)) layers_ += static_cast<std::size_t>(c->layers);
    if (const auto* a = std::get_if<AttentionStep<Bfloat16>>(&call)) {
      phases_ += 3;  // its join, and parts of the linear phase before it
      float_words_ += static_cast<std::size_t>(a->B * a->H * kSplits * (a->dv + 2));
    }
  }
}

std::size_t StepProgram::bytes() const {
  return layers_ * (2 * sizeof(CUtensorMap) + sizeof(LayerWeights)) + phases_ * sizeof(Phase) +
         float_words_ * sizeof(FloatWord) + words_ * sizeof(Word) + sizeof(Counters);
}

cudaError_t StepProgram::add(cudaGraph_t graph, const std::vector<cudaGraphNode_t>& behind, void* memory,
                             cudaGraphNode_t* node) const {
  const auto processors = static_cast<unsigned>(multiprocessors());
  auto* const first_map = static_cast<CUtensorMap*>(memory);
  auto* const first_layer = reinterpret_cast<LayerWeights*>(first_map + 2 * layers_);
  auto* const first_phase = reinterpret_cast<Phase*>(first_layer + layers_);
  auto* const first_float_word = reinterpret_cast<FloatWord*>(first_phase + phases_);
  auto* const first_word = reinterpret_cast<Word*>(first_float_word + float_words_);
  auto* const counters = reinterpret_cast<Counters*>(first_word + words_);

  Handover handover(calls_, first_word);
  std::vector<Phase> phases;
  for (const auto& copy : handover.copies())
    phases.push_back({.kind = Phase::kCopy, .waits = false, .copy = copy});
  auto* float_word = first_float_word;
  for (std::size_t i = 0; i < calls_.size(); ++i) {
    handover.begin_call(i);
    Phase phase{};
    if (const auto* c = std::get_if<SkinnyCall>(&calls_[i])) {
      phase.kind = Phase::kLinear;
      auto& p = phase.linear;
      p.call = *c;
      for (int l = 0; l < c->layers; ++l) {
        p.words[l].x = handover.find(c->layer[l].x, c->rows * c->width);
        p.words[l].add = handover.find(c->layer[l].add, c->rows * c->layer[l].out);
      }
      for (int l = 0; l < c->layers; ++l)
        p.words[l].y = handover.add(p.call.layer[l].y, c->rows * c->layer[l].out);
    } else if (const auto* n = std::get_if<NormCemaStep<Bfloat16>>(&calls_[i])) {
      phase.kind = Phase::kNormCema;
      auto& p = phase.norm_cema;
      p.call = *n, p.x = handover.find(n->x, n->B * n->D);
      p.normal = handover.add(p.call.normal, n->B * n->D), p.y = handover.add(p.call.y, n->B * n->D);
    } else {
      const auto& a = std::get<AttentionStep<Bfloat16>>(calls_[i]);
      phase.kind = Phase::kAttention;
      auto& p = phase.attention;
      p.call = a;
      const auto same = std::ranges::find_if(phases, [&](const Phase& other) {
        const auto& b = other.attention.call;
        return other.kind == Phase::kAttention && a.start == b.start && a.chunk == b.chunk && a.C == b.C &&
               a.dz == b.dz && a.log2_base == b.log2_base;
      });
      p.place = same == phases.end() ? static_cast<int>(i) : same->attention.place;
      // As many groups of columns as there are blocks for.
      const auto groups = [&](int threads) { return ceil_div(a.dv, threads * 8); };
      while (8 << p.key_shift < a.dz) ++p.key_shift;
      p.column_shift = 5;
      while (1 << p.column_shift < kThreads && a.B * a.H * kSplits * groups(1 << p.column_shift) > processors)
        ++p.column_shift;
      p.groups = static_cast<int>(groups(1 << p.column_shift));
      p.partial = float_word, p.moments = p.partial + a.B * a.H * kSplits * a.dv;
      float_word = p.moments + 2 * a.B * a.H * kSplits;
      p.z = handover.find(a.z, a.B * a.H * a.dz), p.v = handover.find(a.v, a.B * a.H * a.dv);
      p.gate = handover.find(a.gate, a.B * a.H * a.dv), p.o = handover.add(p.call.o, a.B * a.H * a.dv);
    }
    phase.waits = handover.overwrites_input();
    phases.push_back(phase);
    if (phase.kind != Phase::kAttention) continue;
    phase.kind = Phase::kJoin, phase.waits = false;
    phases.push_back(phase);
  }
  phases = fill_waits(phases);
  share_tiles(phases, processors);

  std::vector<CUtensorMap> maps;
  std::vector<LayerWeights> layers;
  Layout layout{.stages = 0, .width = 0, .rows = 1, .tiles = 0};
  for (const auto& phase : phases) {
    if (phase.kind != Phase::kLinear) continue;
    const auto& [c, share, words] = phase.linear;
    layout.rows = std::max(layout.rows, c.rows), layout.width = std::max(layout.width, c.width);
    for (int l = 0; l < c.layers; ++l) {
      const auto& layer = c.layer[l];
      const int outputs = layer.up != nullptr ? kTile / 2 : kTile;
      const unsigned end = l + 1 < c.layers ? c.layer[l + 1].first_tile : c.tiles;
      layers.push_back({share, layer.first_tile, end, c.width, outputs});
      for (const auto* weights : {layer.weight, layer.up})
        maps.push_back(weights != nullptr ? map_of(weights, layer.out, c.width, outputs) : CUtensorMap{});
    }
  }
  const auto fill = [](void* to, const auto& from) {
    return cudaMemcpy(to, from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice);
  };
  for (const auto error : {cudaMemset(memory, 0, bytes()), fill(first_map, maps), fill(first_layer, layers),
                           fill(first_phase, phases)})
    if (error != cudaSuccess) return error;

  constexpr int kStatic = 1024;  // bytes of shared memory that the kernel has besides
  layout.tiles = Layout::most_tiles(layout.rows);
  const int room = static_cast<int>(most_shared_memory()) - kStatic - layout.fixed();
  layout.stages = room / (kStageBytes + 2 * static_cast<int>(sizeof(Barrier)));
  const auto shared = static_cast<std::size_t>(layout.bytes());
  allow_shared_memory(run, shared);
  Program program{first_phase,
                  first_layer,
                  first_map,
                  counters,
                  static_cast<int>(phases.size()),
                  static_cast<int>(layers.size())};
  void* arguments[] = {&program, &layout};
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeKernel;
  params.kernel.func = reinterpret_cast<void*>(run);
  params.kernel.gridDim = dim3(processors);
  params.kernel.blockDim = dim3(kThreads + kProducers);
  params.kernel.sharedMemBytes = static_cast<unsigned>(shared);
  params.kernel.kernelParams = arguments;
  if (const auto error = cudaGraphAddNode(node, graph, behind.data(), nullptr, behind.size(), &params))
    return error;
  cudaLaunchAttributeValue all_at_once{};
  all_at_once.cooperative = 1;
  return cudaGraphKernelNodeSetAttribute(*node, cudaLaunchAttributeCooperative, &all_at_once);
}

StepRecorder::StepRecorder() {
  recorder = this;
}
StepRecorder::~StepRecorder() {
  recorder = nullptr;
}

void note_call(const StepCall& call, cudaStream_t stream) {
  if (recorder == nullptr || !StepProgram::takes(call)) return;
  cudaStreamCaptureStatus status{};
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  std::size_t count = 0;
  if (cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, &edges, &count) != cudaSuccess ||
      status != cudaStreamCaptureStatusActive || count != 1)
    return;
  recorder->calls_.push_back({call, nodes[0]});
}

}  // namespace megalodon::ops::cuda
