#include "ops/product_rms_norm/cuda.h"

#include <algorithm>

#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_mma.h"
#include "ops/cuda_step.h"
#include "ops/cuda_tensor_map.h"

// A cluster of two blocks goes through tiles of whole rows, a block with half of their columns. In a block
// two warpgroups multiply a tile each in turn, so that what one does with its sums falls into the other's
// products; the matrices that are added to and those that are made go through shared memory by the copy
// engine, 128 bytes of each row at a time. Of a row the blocks tell each other one sum.
namespace megalodon::ops::cuda {
namespace {

constexpr int kD = kNormProductWidth, kBlocks = 2, kColumns = kD / kBlocks;
constexpr int kHalves = 2, kRows = 64 * kHalves;  // of a tile
constexpr int kDepth = 64, kStages = 4;
constexpr int kPieces = kColumns / 32, kSlots = 3;  // of float32
constexpr int kRoundedPieces = kColumns / 64;
[[maybe_unused]] constexpr int kThreads = 384, kMultiplying = 256, kWarps = 8;
[[maybe_unused]] constexpr int kHalfBytes = 64 * 128;
constexpr int kRowsBytes = kRows * 128, kWeightBytes = kColumns * 128,
              kStageBytes = kRowsBytes + kWeightBytes, kPieceBytes = kRows * 128;

struct Work {
  CUtensorMap x, weight;
  CUtensorMap h{}, d_sum{}, to{}, rounded{};       // [M, D]; h: the residual or, backward, the sum
  int M = 0, depth = 0;                            // depth: stages
  bool added = false, rounds = true;               // whether there is a d_sum, a rounded
  const float *factor = nullptr, *rstd = nullptr;  // [D]; backward: [M]
  float* of_rows = nullptr;                        // forward: rstd [M], backward: [clusters, D]
  float eps = 0;
};

struct Shared {
  char stages[kStages][kStageBytes];
  char slots[kSlots][kPieceBytes], rounded[kPieceBytes];
  Barrier full[kStages], empty[kStages];
  Barrier came_in[kSlots], used[kSlots], gone[kSlots];  // of slots
  Barrier rounded_there, rounded_gone;
  Barrier came[kWarps][2];
  alignas(
      16) float2 others[kWarps][2][16];  // the other block's sums of a warp's 32 rows, of two tiles in turn
};
static_assert(sizeof(Shared) <= 227 * 1024);

// The rows of a cluster's i-th tile are those from first_row(i) on.
[[maybe_unused]] __device__ int first_row(int i) {
  return (blockIdx.x + i * gridDim.x) * kRows;
}

// What goes through the slots for a tile: f(its matrix, the piece, whether it goes to memory from there).
template <bool kForward, class F>
__device__ void for_pieces(const Work& work, F&& f) {
#pragma unroll 1
  for (int p = 0; p < kPieces; ++p) f(work.h, p, kForward);
  if constexpr (!kForward) {
#pragma unroll 1
    for (int p = 0; p < kPieces; ++p) {
      f(work.h, p, !work.added);
      if (work.added) f(work.d_sum, p, true);
    }
  }
}
template <bool kForward>
__device__ int pieces_of_tile(const Work& work) {
  return kForward ? kPieces : (work.added ? 3 : 2) * kPieces;
}

// The parts of four copying threads.
template <bool kForward>
__device__ void copy_for_products(const Work& work, Shared& shared) {
  RingPlace<kStages> place(0);
  for (int i = 0, row; (row = first_row(i)) < work.M; ++i) {
#pragma unroll 1
    for (int k = 0; k < work.depth; ++k) {
      Barrier& full = shared.full[place.stage];
      shared.empty[place.stage].wait(place.phase + 1);
      full.arrive_expecting(kStageBytes);
      char* const to = shared.stages[place.stage];
      copy_tile(to, work.x, row, k, full);
      if constexpr (kForward) {
        copy_tile(to + kRowsBytes, work.weight, blockIdx.z * kColumns, k, full);
      } else {
        copy_tile(to + kRowsBytes, work.weight, k * kDepth, blockIdx.z * (kColumns / 64), full);
      }
      place.advance();
    }
  }
}

template <bool kForward>
__device__ void copy_pieces(const Work& work, Shared& shared) {
  RingPlace<kSlots> place(0);
  for (int i = 0, row; (row = first_row(i)) < work.M; ++i) {
    for_pieces<kForward>(work, [&](const CUtensorMap& matrix, int piece, bool) {
      Barrier& came_in = shared.came_in[place.stage];
      shared.gone[place.stage].wait(place.phase + 1);
      came_in.arrive_expecting(kPieceBytes);
      copy_tile(shared.slots[place.stage], matrix, row, blockIdx.z * kPieces + piece, came_in);
      place.advance();
    });
  }
}

template <bool kForward>
__device__ void copy_pieces_back(const Work& work, Shared& shared) {
  RingPlace<kSlots> place(0);
  for (int i = 0, row; (row = first_row(i)) < work.M; ++i) {
    for_pieces<kForward>(work, [&](const CUtensorMap&, int piece, bool goes) {
      shared.used[place.stage].wait(place.phase);
      if (goes) {
        copy_tile_back(work.to, row, blockIdx.z * kPieces + piece, shared.slots[place.stage]);
        commit_copies_back();
        wait_for_copies_back();
      }
      shared.gone[place.stage].arrive();
      place.advance();
    });
  }
}

__device__ inline void copy_rounded_back(const Work& work, Shared& shared) {
  if (!work.rounds) return;
  for (int i = 0, n = 0, row; (row = first_row(i)) < work.M; ++i) {
#pragma unroll 1
    for (int piece = 0; piece < kRoundedPieces; ++piece, ++n) {
      shared.rounded_there.wait(n);
      copy_tile_back(work.rounded, row, blockIdx.z * kRoundedPieces + piece, shared.rounded);
      commit_copies_back();
      wait_for_copies_back();
      shared.rounded_gone.arrive();
    }
  }
}

using Product = float[kHalves][kColumns / 2];

// The warpgroups use slots, and then the place for what is rounded, in the order of their tiles.
template <int kBarrier>
class Turns {
 public:
  // The first is the warpgroup 0's.
  __device__ explicit Turns(int warpgroup) : mine_(kBarrier + warpgroup), other_(kBarrier + 1 - warpgroup) {
    if (warpgroup == 1) named_arrive(other_, kMultiplying);
  }
  __device__ void begin() const { named_wait(mine_, kMultiplying); }
  __device__ void end() const { named_arrive(other_, kMultiplying); }

 private:
  int mine_, other_;
};

// Behind the products of a warpgroup's tiles. A thread has of a tile the rows 64 half + 16 warp + lane / 4 +
// 8 i and in each 8 columns two from lane % 4 * 2 on.
template <bool kForward>
class Epilogue {
 public:
  __device__ Epilogue(const Work& work, Shared& shared, int warpgroup)
      : work_(work), shared_(shared), warp_(threadIdx.x / 32 - 4), pieces_(warpgroup), rounded_(warpgroup) {
    const int lane = threadIdx.x % 32, row = lane / 4, places = (warp_ % 4 * 16 + row) * 128;
    pair_ = places + (lane % 4 / 2 ^ row) * 16 + lane % 2 * 8;
    rounded_pair_ = places + row * 16 + lane % 4 * 4;
    row_ = warp_ % 4 * 16 + row;
    factor_ = work.factor + blockIdx.z * kColumns + lane % 4 * 2;
  }

  // Before the products of the block's i-th tile, the warpgroup's n-th.
  __device__ void begin(int i, int n) {
    tile_ = i, turn_ = n;
    if constexpr (!kForward) {
      for_rows([&](int half, int i) { rstd_[half][i] = has(half, i) ? work_.rstd[row(half, i)] : 0; });
    }
  }
  __device__ void finish(Product& d) {
    if constexpr (kForward) {
      forward(d);
    } else {
      backward(d);
    }
  }
  // Sums over all rows, in d_factor [warps, columns].
  __device__ void write_columns(float* d_factor) const {
    const int lane = threadIdx.x % 32, column = lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) d_factor[warp_ * kColumns + 32 * p + column] = of_columns_[p];
  }

 private:
  struct Place {
    int stage;
    char* slot;
  };
  using Ring = RingPlace<kSlots>;

  __device__ Place next(Ring& ring) const {
    const Place place{ring.stage, shared_.slots[ring.stage]};
    shared_.came_in[ring.stage].wait(ring.phase);
    ring.advance();
    return place;
  }
  // The slot's pairs of columns, of the j-th 8.
  __device__ float2& pair(const Place& place, int half, int i, int j) const {
    return *reinterpret_cast<float2*>(place.slot + (pair_ ^ 32 * j) + half * kHalfBytes + i * 1024);
  }
  __device__ void round(int half, int i, int j, float a, float b) const {
    *reinterpret_cast<std::uint32_t*>(shared_.rounded + (rounded_pair_ ^ 16 * j) + half * kHalfBytes +
                                      i * 1024) = pack(a, b);
  }
  // Of the n-th rounded piece of the tile.
  __device__ void begin_rounded(int n) const { shared_.rounded_gone.wait(tile_ * kRoundedPieces + n + 1); }
  __device__ void end_rounded() const {
    written_for_copies();
    shared_.rounded_there.arrive();
  }
  __device__ void done(const Place& place) const { shared_.used[place.stage].arrive(); }
  __device__ float2 factor(int j) const { return __ldg(reinterpret_cast<const float2*>(factor_ + 8 * j)); }

  __device__ void forward(Product& d) const {
    float squares[kHalves][2] = {};
    Ring ring(tile_ * kPieces);
    pieces_.begin();
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const Place place = next(ring);
      for_pairs([&](int half, int i, int j) {
        float2& h = pair(place, half, i, j);
        float* const sum = d[half] + 4 * (4 * p + j) + 2 * i;
        sum[0] += h.x, sum[1] += h.y;
        squares[half][i] += sum[0] * sum[0] + sum[1] * sum[1];
        h = {sum[0], sum[1]};
      });
      written_for_copies();
      done(place);
    }
    pieces_.end();
    add_other_blocks(squares);
    for_rows([&](int half, int i) {
      float& r = squares[half][i];
      r = rsqrtf(r / kD + work_.eps);
      if (has(half, i) && blockIdx.z == 0 && threadIdx.x % 4 == 0) work_.of_rows[row(half, i)] = r;
    });
    rounded_.begin();
#pragma unroll
    for (int n = 0; n < kRoundedPieces; ++n) {
      begin_rounded(n);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = factor(8 * n + j);
        for_rows([&](int half, int i) {
          const float* const sum = d[half] + 4 * (8 * n + j) + 2 * i;
          const float r = squares[half][i];
          round(half, i, j, sum[0] * r * f.x, sum[1] * r * f.y);
        });
      }
      end_rounded();
    }
    rounded_.end();
  }

  // With g = d factor and r = rstd: dx = d_sum + r (g - h r^2 mean(g h)), d_factor = sum of d h r.
  __device__ void backward(Product& d) {
    float products[kHalves][2] = {};
    Ring ring(tile_ * pieces_of_tile<kForward>(work_));
    pieces_.begin();
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const Place place = next(ring);
      float columns[8] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 f = factor(4 * p + j);
        for_rows([&](int half, int i) {
          const float2 h = pair(place, half, i, j);
          float* const g = d[half] + 4 * (4 * p + j) + 2 * i;
          const float a = g[0] * h.x, b = g[1] * h.y;
          columns[2 * j] += a * rstd_[half][i], columns[2 * j + 1] += b * rstd_[half][i];
          products[half][i] += a * f.x + b * f.y;
          g[0] *= f.x, g[1] *= f.y;
        });
      }
      done(place);
      of_columns_[p] += sum_of_lanes(columns);  // the lane / 4-th
    }
    add_other_blocks(products);
    for_rows([&](int half, int i) { products[half][i] *= rstd_[half][i] * rstd_[half][i] / kD; });
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const Place of_h = next(ring), place = work_.added ? next(ring) : of_h;
      if (work_.rounds && p % 2 == 0) begin_rounded(p / 2);
      for_pairs([&](int half, int i, int j) {
        const float2 h = pair(of_h, half, i, j);
        float2& to = pair(place, half, i, j);
        const float2 d_sum = to;
        const float* const g = d[half] + 4 * (4 * p + j) + 2 * i;
        const float r = rstd_[half][i], mean = products[half][i];
        float2 dx{r * (g[0] - h.x * mean), r * (g[1] - h.y * mean)};
        if (work_.added) dx.x += d_sum.x, dx.y += d_sum.y;
        to = dx;
        if (work_.rounds) round(half, i, p % 2 * 4 + j, dx.x, dx.y);
      });
      if (work_.added) done(of_h);
      written_for_copies();
      done(place);
      if (work_.rounds && p % 2 == 1) end_rounded();
    }
    pieces_.end();
  }

  __device__ int row(int half, int i) const { return first_row(tile_) + row_ + 64 * half + 8 * i; }
  __device__ bool has(int half, int i) const { return row(half, i) < work_.M; }
  template <class F>
  __device__ static void for_rows(F&& f) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) f(half, 0), f(half, 1);
  }
  template <class F>
  __device__ static void for_pairs(F&& f) {
#pragma unroll
    for (int j = 0; j < 4; ++j) for_rows([&](int half, int i) { f(half, i, j); });
  }

  // Sums of the thread's rows become those of all columns.
  __device__ void add_other_blocks(float (&sums)[kHalves][2]) const {
    for_rows([&](int half, int i) {
      float& sum = sums[half][i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    });
    const int lane = threadIdx.x % 32, column = lane % 4, turn = turn_ % 2;
    float2* const others = shared_.others[warp_][turn] + lane / 4 * kHalves;
    Barrier& came = shared_.came[warp_][turn];
    if (lane == 0) came.arrive_expecting(sizeof(shared_.others[0][0]));
    if (column < kHalves) {
      const unsigned other = 1 - blockIdx.z;
      send_to_block(address_in_block(others + column, other), column == 0 ? sums[0][0] : sums[1][0],
                    column == 0 ? sums[0][1] : sums[1][1], address_in_block(&came, other));
    }
    came.wait(turn_ / 2);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      sums[half][0] += others[half].x, sums[half][1] += others[half].y;
  }

  const Work& work_;
  Shared& shared_;
  int warp_, row_, tile_ = 0, turn_ = 0;
  int pair_, rounded_pair_;  // bytes from the begin of a piece
  const float* factor_;
  Turns<4> pieces_;
  Turns<6> rounded_;
  float rstd_[kHalves][2];
  float of_columns_[kPieces] = {};
};

// The part of the multiplying warpgroups.
template <bool kForward>
__device__ void multiply_and_finish(const Work& work, Shared& shared) {
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, lane = thread % 32;
  const auto release = [&](int stage) {
    if (lane == 0) shared.empty[stage].arrive();
  };
  // In turns: then a barrier's phase before the one that is waited for is over, as a wait needs.
  const Turns<1> products(warpgroup);
  Epilogue<kForward> epilogue(work, shared, warpgroup);
  for (int i = warpgroup, n = 0; first_row(i) < work.M; i += 2, ++n) {
    Product d;
    RingPlace<kStages> place(i * work.depth);
    int previous = 0;
    epilogue.begin(i, n);
    products.begin();
    for (int k = 0; k < work.depth; ++k) {
      shared.full[place.stage].wait(place.phase);
      const char* const rows = shared.stages[place.stage];
      products_begin();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          multiply<false, !kForward>(d[half], operand<false>(rows + half * kHalfBytes, step),
                                     operand<!kForward>(rows + kRowsBytes, step), k + step > 0);
        }
      }
      products_commit();
      if (k > 0) {
        products_wait<1>();
        release(previous);
      }
      previous = place.stage;
      place.advance();
    }
    products.end();
    products_wait<0>();
    release(previous);
    epilogue.finish(d);
  }
  if constexpr (!kForward) {
    named_wait(3, kMultiplying);
    epilogue.write_columns(reinterpret_cast<float*>(shared.stages));
  }
}

// What write_columns() of all warps wrote.
[[maybe_unused]] __device__ void sum_columns(const Work& work, const Shared& shared) {
  const auto* const d_factor = reinterpret_cast<const float*>(shared.stages);
  const int column = threadIdx.x;
  if (column >= kColumns) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += d_factor[warp * kColumns + column];
  work.of_rows[std::int64_t{blockIdx.x} * kD + blockIdx.z * kColumns + column] = sum;
}

template <bool kForward>
__global__ void __launch_bounds__(kThreads, 1) products(const __grid_constant__ Work work) {
  if constexpr (kForHopper) {
    extern __shared__ __align__(1024) char shared_bytes[];
    auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) shared.full[i].start(1), shared.empty[i].start(4);  // warps
      for (int i = 0; i < kSlots; ++i)
        shared.came_in[i].start(1), shared.used[i].start(128), shared.gone[i].start(1);
      shared.rounded_there.start(128), shared.rounded_gone.start(1);
      for (auto& came : shared.came) came[0].start(1), came[1].start(1);
      barriers_are_started();
    }
    __syncthreads();
    cluster_sync();  // the other block's barriers too
    wait_for_previous();
    if (threadIdx.x >= 128) {
      take_registers<240>();
      multiply_and_finish<kForward>(work, shared);
    } else {
      give_registers<24>();
      if (threadIdx.x == 0) copy_for_products<kForward>(work, shared);
      if (threadIdx.x == 32) copy_pieces<kForward>(work, shared);
      if (threadIdx.x == 64) copy_pieces_back<kForward>(work, shared);
      if (threadIdx.x == 96) copy_rounded_back(work, shared);
      __syncwarp();
    }
    cluster_sync();  // no block ends while the other sends to it; backward, the columns' sums are there
    if constexpr (!kForward) sum_columns(work, shared);
  }
}

template <class T>
CUtensorMap matrix_map(const T* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                       int box_blocks) {
  return cuda::matrix_map("product_rms_norm", matrix, rows, columns, columns, box_rows, box_blocks);
}
// Of a matrix [M, D] that goes through slots; some there are only sometimes.
template <class T>
CUtensorMap pieces_map(const T* matrix, std::int64_t M) {
  return matrix == nullptr ? CUtensorMap{} : matrix_map(matrix, M, kD, kRows, 1);
}

std::int64_t clusters(std::int64_t M) {
  return std::min(std::max<std::int64_t>(multiprocessors() / kBlocks, 1), ceil_div(M, kRows));
}

template <bool kForward>
void launch(Work& work, std::int64_t M, std::int64_t K, cudaStream_t stream) {
  work.M = static_cast<int>(M), work.depth = static_cast<int>(K / kDepth);
  allow_shared_memory(products<kForward>, sizeof(Shared));
  launch_step({dim3(grid_size(clusters(M)), 1, kBlocks), kThreads, sizeof(Shared), stream, kBlocks},
              products<kForward>, work);
}

}  // namespace

bool has_product_rms_norm() {
  return has_hopper_code();
}

void product_rms_norm(const ProductRmsNorm& p, cudaStream_t stream) {
  Work work{.x = matrix_map(p.x, p.M, p.K, kRows, 1),
            .weight = matrix_map(p.weight, kD, p.K, kColumns, 1),
            .h = pieces_map(p.residual, p.M),
            .to = pieces_map(p.sum, p.M),
            .rounded = pieces_map(p.normal, p.M),
            .factor = p.factor,
            .of_rows = p.rstd,
            .eps = p.eps};
  launch<true>(work, p.M, p.K, stream);
}

std::int64_t product_rms_norm_sums(std::int64_t M) {
  return clusters(M);
}

void product_rms_norm_gradients(const ProductRmsNormGradients& p, cudaStream_t stream) {
  Work work{.x = matrix_map(p.dy, p.M, p.K, kRows, 1),
            .weight = matrix_map(p.weight, p.K, kD, kDepth, kColumns / 64),
            .h = pieces_map(p.sum, p.M),
            .d_sum = pieces_map(p.d_sum, p.M),
            .to = pieces_map(p.dx, p.M),
            .rounded = pieces_map(p.d_added, p.M),
            .added = p.d_sum != nullptr,
            .rounds = p.d_added != nullptr,
            .factor = p.factor,
            .rstd = p.rstd,
            .of_rows = p.d_factor};
  launch<false>(work, p.M, p.K, stream);
}

}  // namespace megalodon::ops::cuda
