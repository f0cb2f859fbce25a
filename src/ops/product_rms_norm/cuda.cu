#include "ops/product_rms_norm/cuda.h"

#include <algorithm>

#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_mma.h"
#include "ops/cuda_step.h"
#include "ops/cuda_tensor_map.h"

// A cluster of two blocks goes through tiles of whole rows, a block with half of their columns. In a block a
// warpgroup copies, two multiply a tile each in turn, so that what one does with its sums falls into the
// other's products. Of a row the blocks tell each other one sum.
namespace megalodon::ops::cuda {
namespace {

constexpr int kD = kNormProductWidth, kBlocks = 2, kColumns = kD / kBlocks;
constexpr int kHalves = 2, kRows = 64 * kHalves;  // of a tile
constexpr int kDepth = 64, kStages = 5;
[[maybe_unused]] constexpr int kThreads = 384, kMultiplying = 256, kWarps = 8;
[[maybe_unused]] constexpr int kHalfBytes = 64 * 128;
constexpr int kRowsBytes = kRows * 128, kWeightBytes = kColumns * 128,
              kStageBytes = kRowsBytes + kWeightBytes;

struct Work {
  CUtensorMap x, weight;
  int M = 0, depth = 0;                            // depth: stages
  const float *h = nullptr, *d_sum = nullptr;      // [M, D]: the residual or, backward, the sum
  const float *factor = nullptr, *rstd = nullptr;  // [D]; backward: [M]
  float *to = nullptr, *of_rows = nullptr;         // [M, D]; forward: rstd [M], backward: [clusters, D]
  Bfloat16* rounded = nullptr;                     // [M, D]
  float eps = 0;
};

struct Shared {
  Barrier full[kStages], empty[kStages], came[kWarps][2];
  alignas(
      16) float2 others[kWarps][2][16];  // the other block's sums of a warp's 32 rows, of two tiles in turn
  alignas(16) float factor[kColumns];
  float d_factor[kWarps][kColumns];
};
constexpr int kBytes = 1024 + kStages * kStageBytes + sizeof(Shared);
static_assert(kBytes <= 227 * 1024);

// The rows of a cluster's i-th tile are those from first_row(i) on.
[[maybe_unused]] __device__ int first_row(int i) {
  return (blockIdx.x + i * gridDim.x) * kRows;
}

// To the second cache, a block's share of what a tile's epilogue reads: the rows of one of `stages` parts.
[[maybe_unused]] __device__ void prefetch_rows(const Work& work, const float* matrix, int tile, int k) {
  if (matrix == nullptr) return;
  constexpr int kShare = kRows / kBlocks;
  const int share = tile + blockIdx.z * kShare;
  const int from = share + k * kShare / work.depth;
  const int to = min(share + (k + 1) * kShare / work.depth, work.M);
  if (from < to) prefetch_bytes(matrix + std::int64_t{from} * kD, (to - from) * kD * 4);
}

// The part of the copying thread.
template <bool kForward>
__device__ void copy_for_products(const Work& work, char* stages, Shared& shared) {
  RingPlace<kStages> place(0);
  for (int i = 0, row; (row = first_row(i)) < work.M; ++i) {
#pragma unroll 1
    for (int k = 0; k < work.depth; ++k) {
      Barrier& full = shared.full[place.stage];
      shared.empty[place.stage].wait(place.phase + 1);
      full.arrive_expecting(kStageBytes);
      char* const to = stages + place.stage * kStageBytes;
      copy_tile(to, work.x, row, k, full);
      if constexpr (kForward) {
        copy_tile(to + kRowsBytes, work.weight, blockIdx.z * kColumns, k, full);
      } else {
        copy_tile(to + kRowsBytes, work.weight, k * kDepth, blockIdx.z * (kColumns / 64), full);
      }
      prefetch_rows(work, work.h, row, k);
      if constexpr (!kForward) prefetch_rows(work, work.d_sum, row, k);
      place.advance();
    }
  }
}

using Product = float[kHalves][kColumns / 2];

// As one instruction: a branch would make products wait for each other.
[[maybe_unused]] __device__ float choose(bool first, float a, float b) {
  float to;
  asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}\n"
      : "=f"(to)
      : "f"(a), "f"(b), "r"(static_cast<int>(first)));
  return to;
}

// 4 numbers, zeros where they are not wanted.
[[maybe_unused]] __device__ void read(float (&to)[4], const float* from, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0f00000000;\nmov.b32 %1, 0f00000000;\nmov.b32 %2, 0f00000000;\nmov.b32 %3, 0f00000000;\n"
      "@p ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&f"(to[0]), "=&f"(to[1]), "=&f"(to[2]), "=&f"(to[3])
      : "l"(from), "r"(static_cast<int>(wanted)));
}

// And to memory, where they are wanted there: as they are, or rounded.
[[maybe_unused]] __device__ void write(const float (&x)[4], float* to, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.f32 [%4], {%0, %1, %2, %3};\n}\n" ::"f"(x[0]),
      "f"(x[1]), "f"(x[2]), "f"(x[3]), "l"(to), "r"(static_cast<int>(wanted))
      : "memory");
}
[[maybe_unused]] __device__ void write(const float (&x)[4], Bfloat16* to, bool wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.global.v2.b32 [%2], {%0, %1};\n}\n" ::"r"(
                   pack(x[0], x[1])),
               "r"(pack(x[2], x[3])), "l"(to), "r"(static_cast<int>(wanted))
               : "memory");
}

// A place of which the compiler knows nothing, so that those of parts are at constant distances from it.
template <class T>
__device__ T* opaque(T* place) {
  asm volatile("" : "+l"(place));
  return place;
}

// Behind the products of a warpgroup's n-th tile.
template <bool kForward>
class Epilogue {
 public:
  __device__ Epilogue(const Work& work, Shared& shared, int row, int n)
      : work_(work), shared_(shared), n_(n) {
    const int lane = threadIdx.x % 32, first = row + threadIdx.x % 128 / 32 * 16 + lane / 4;
    warp_ = threadIdx.x / 32 - 4;
    column_ = (lane & 1) * 8 + (lane & 2) * 2;
    rows_ = work.M - first;
    first_ = first;
    at_ = std::int64_t{first} * kD + blockIdx.z * kColumns + column_;
  }

  __device__ void finish(Product& d) const {
    if constexpr (kForward) {
      forward(d);
    } else {
      backward(d);
    }
  }

 private:
  // What a thread has of a tile: of 4 rows, 8 i + 64 half below its first, 4 columns in each 16 from its
  // first on. gather() brings them there.
  static constexpr int kParts = kColumns / 16 * 4;
  struct Part {
    int q, half, i;
    __device__ constexpr explicit Part(int p) : q(p / 4), half(p / 2 % 2), i(p % 2) {}
    __device__ constexpr int row() const { return 64 * half + 8 * i; }
    __device__ constexpr int offset() const { return row() * kD + 16 * q; }
    // Of the e-th number, in a product.
    __device__ constexpr int number(int e) const { return 8 * q + 4 * (e / 2) + 2 * i + e % 2; }
  };

  // A lane has the columns 2 c and 2 c + 1 of eight and of the next eight; neighbours exchange, so that an
  // even one has four of the first and an odd one of the second.
  __device__ static void gather(Product& d, Part part) {
    float (&of)[kColumns / 2] = d[part.half];
    const bool odd = threadIdx.x & 1;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float &first = of[part.number(e)], &second = of[part.number(2 + e)];
      const float other = __shfl_xor_sync(~0u, choose(odd, first, second), 1);
      first = choose(odd, other, first);
      second = choose(odd, second, other);
    }
  }

  __device__ void forward(Product& d) const {
    constexpr int kAhead = 8;
    float x[kAhead][4], squares[kHalves][2] = {};
    const float* const residual = at(work_.h);
    float* const sum = at(work_.to);
#pragma unroll
    for (int p = 0; p < kAhead; ++p) read(x[p], residual + Part(p).offset(), has(Part(p)));
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part part(p);
      gather(d, part);
      float h[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        h[e] = d[part.half][part.number(e)] += x[p % kAhead][e];
        squares[part.half][part.i] += h[e] * h[e];
      }
      write(h, sum + part.offset(), has(part));
      if (p + kAhead < kParts) {
        const Part next(p + kAhead);
        read(x[p % kAhead], residual + next.offset(), has(next));
      }
    }
    add_other_blocks(squares);
    for_rows([&](int half, int i) {
      float& r = squares[half][i];
      r = rsqrtf(r / kD + work_.eps);
      if (has(half, i) && blockIdx.z == 0 && column_ == 0) work_.of_rows[first_ + 64 * half + 8 * i] = r;
    });
    Bfloat16* const to = at(work_.rounded);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part part(p);
      float f[4], normal[4];
      load(shared_.factor + 16 * part.q + column_, f);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        normal[e] = d[part.half][part.number(e)] * squares[part.half][part.i] * f[e];
      write(normal, to + part.offset(), has(part));
    }
  }

  // With g = d factor and r = rstd: dx = d_sum + r (g - h r^2 mean(g h)), d_factor = sum of d h r.
  __device__ void backward(Product& d) const {
    constexpr int kAhead = 4;
    float h[kAhead][4], r[kHalves][2], products[kHalves][2] = {}, of_columns[4] = {};
    const float* const sum = at(work_.h);
    for_rows(
        [&](int half, int i) { r[half][i] = has(half, i) ? work_.rstd[first_ + 64 * half + 8 * i] : 0; });
#pragma unroll
    for (int p = 0; p < kAhead; ++p) read(h[p], sum + Part(p).offset(), has(Part(p)));
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part part(p);
      gather(d, part);
      float f[4];
      load(shared_.factor + 16 * part.q + column_, f);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& g = d[part.half][part.number(e)];
        const float product = g * h[p % kAhead][e];
        of_columns[e] += product * r[part.half][part.i];
        products[part.half][part.i] += product * f[e];
        g *= f[e];
      }
      if (p % 4 == 3) add_columns(part.q, of_columns);
      if (p + kAhead < kParts) {
        const Part next(p + kAhead);
        read(h[p % kAhead], sum + next.offset(), has(next));
      }
    }
    add_other_blocks(products);
    constexpr int kBoth = kAhead / 2;  // h and d_sum
    const bool added = work_.d_sum != nullptr, rounds = work_.rounded != nullptr;
    const float* const d_sum = at(work_.d_sum);
    float* const to = at(work_.to);
    Bfloat16* const rounded = at(work_.rounded);
    const auto read_both = [&](int p) {
      const Part part(p);
      read(h[p % kBoth], sum + part.offset(), has(part));
      read(h[kBoth + p % kBoth], d_sum + part.offset(), has(part) && added);
    };
#pragma unroll
    for (int p = 0; p < kBoth; ++p) read_both(p);
    for_rows([&](int half, int i) { products[half][i] *= r[half][i] * r[half][i] / kD; });
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part part(p);
      float dx[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dx[e] = h[kBoth + p % kBoth][e] +
                r[part.half][part.i] *
                    (d[part.half][part.number(e)] - h[p % kBoth][e] * products[part.half][part.i]);
      }
      write(dx, to + part.offset(), has(part));
      write(dx, rounded + part.offset(), has(part) && rounds);
      if (p + kBoth < kParts) read_both(p + kBoth);
    }
  }

  template <class T>
  __device__ T* at(T* matrix) const {
    return opaque(matrix + at_);
  }
  __device__ bool has(int half, int i) const { return 64 * half + 8 * i < rows_; }
  __device__ bool has(Part part) const { return part.row() < rows_; }
  template <class F>
  __device__ static void for_rows(F&& f) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) f(half, 0), f(half, 1);
  }

  // Sums of the thread's rows become those of all columns.
  __device__ void add_other_blocks(float (&sums)[kHalves][2]) const {
    for_rows([&](int half, int i) {
      float& sum = sums[half][i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    });
    const int lane = threadIdx.x % 32, column = lane % 4, turn = n_ % 2;
    float2* const others = shared_.others[warp_][turn] + lane / 4 * kHalves;
    Barrier& came = shared_.came[warp_][turn];
    if (lane == 0) came.arrive_expecting(sizeof(shared_.others[0][0]));
    if (column < kHalves) {
      const unsigned other = 1 - blockIdx.z;
      send_to_block(address_in_block(others + column, other), column == 0 ? sums[0][0] : sums[1][0],
                    column == 0 ? sums[0][1] : sums[1][1], address_in_block(&came, other));
    }
    came.wait(n_ / 2);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      sums[half][0] += others[half].x, sums[half][1] += others[half].y;
  }

  // The warp's sums over the rows of 16 columns join those of its other tiles; `sums` are zeros then. Lanes
  // of the same columns exchange them, until each has one.
  __device__ void add_columns(int q, float (&sums)[4]) const {
    const int lane = threadIdx.x % 32;
    const bool upper = lane & 16, odd = lane & 8;
    float pair[2], sum;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      pair[e] = upper ? sums[2 + e] : sums[e];
      pair[e] += __shfl_xor_sync(~0u, upper ? sums[e] : sums[2 + e], 16);
    }
    sum = odd ? pair[1] : pair[0];
    sum += __shfl_xor_sync(~0u, odd ? pair[0] : pair[1], 8);
    sum += __shfl_xor_sync(~0u, sum, 4);
    if ((lane & 4) == 0) shared_.d_factor[warp_][16 * q + column_ + 2 * upper + odd] += sum;
#pragma unroll
    for (float& x : sums) x = 0;
  }

  const Work& work_;
  Shared& shared_;
  int n_, warp_, column_, rows_, first_;
  std::int64_t at_;  // in matrices, of the first part
};

// The part of the multiplying warpgroups.
template <bool kForward>
__device__ void multiply_and_finish(const Work& work, const char* stages, Shared& shared) {
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, lane = thread % 32;
  for (int i = thread; i < kColumns; i += kMultiplying)
    shared.factor[i] = work.factor[blockIdx.z * kColumns + i];
  if constexpr (!kForward) {
    for (int i = thread; i < kWarps * kColumns; i += kMultiplying) shared.d_factor[0][i] = 0;
  }
  named_wait(3, kMultiplying);
  const auto release = [&](int stage) {
    if (lane == 0) shared.empty[stage].arrive();
  };
  if (warpgroup == 1) named_arrive(1, kMultiplying);
  for (int i = warpgroup, n = 0, row; (row = first_row(i)) < work.M; i += 2, ++n) {
    Product d;
    RingPlace<kStages> place(i * work.depth);
    int previous = 0;
    // In turns: then a barrier's phase before the one that is waited for is over, as a wait needs.
    named_wait(1 + warpgroup, kMultiplying);
    for (int k = 0; k < work.depth; ++k) {
      shared.full[place.stage].wait(place.phase);
      const char* const rows = stages + place.stage * kStageBytes;
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
    named_arrive(2 - warpgroup, kMultiplying);
    products_wait<0>();
    release(previous);
    Epilogue<kForward>(work, shared, row, n).finish(d);
  }
  if constexpr (!kForward) {
    named_wait(3, kMultiplying);
    if (thread < kColumns) {
      float sum = 0;
      for (const auto& of_warp : shared.d_factor) sum += of_warp[thread];
      work.of_rows[std::int64_t{blockIdx.x} * kD + blockIdx.z * kColumns + thread] = sum;
    }
  }
}

template <bool kForward>
__global__ void __launch_bounds__(kThreads, 1) products(const __grid_constant__ Work work) {
  if constexpr (kForHopper) {
    extern __shared__ char shared_bytes[];
    char* const stages = shared_bytes + (-shared_address(shared_bytes) & 1023);
    auto& shared = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) shared.full[i].start(1), shared.empty[i].start(4);  // warps
      for (auto& came : shared.came) came[0].start(1), came[1].start(1);
      barriers_are_started();
    }
    __syncthreads();
    cluster_sync();  // the other block's barriers too
    wait_for_previous();
    if (threadIdx.x >= 128) {
      take_registers<240>();
      multiply_and_finish<kForward>(work, stages, shared);
    } else {
      give_registers<24>();
      if (threadIdx.x == 0) copy_for_products<kForward>(work, stages, shared);
      __syncwarp();
    }
    cluster_sync();  // no block ends while the other sends to it
  }
}

CUtensorMap matrix_map(const Bfloat16* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                       int box_blocks) {
  return cuda::matrix_map("product_rms_norm", matrix, rows, columns, columns, box_rows, box_blocks);
}

std::int64_t clusters(std::int64_t M) {
  return std::min(std::max<std::int64_t>(multiprocessors() / kBlocks, 1), ceil_div(M, kRows));
}

template <bool kForward>
void launch(Work& work, std::int64_t M, std::int64_t K, cudaStream_t stream) {
  work.M = static_cast<int>(M), work.depth = static_cast<int>(K / kDepth);
  allow_shared_memory(products<kForward>, kBytes);
  launch_step({dim3(grid_size(clusters(M)), 1, kBlocks), kThreads, kBytes, stream, kBlocks},
              products<kForward>, work);
}

}  // namespace

bool has_product_rms_norm() {
  return has_hopper_code();
}

void product_rms_norm(const ProductRmsNorm& p, cudaStream_t stream) {
  Work work{.x = matrix_map(p.x, p.M, p.K, kRows, 1),
            .weight = matrix_map(p.weight, kD, p.K, kColumns, 1),
            .h = p.residual,
            .factor = p.factor,
            .to = p.sum,
            .of_rows = p.rstd,
            .rounded = p.normal,
            .eps = p.eps};
  launch<true>(work, p.M, p.K, stream);
}

std::int64_t product_rms_norm_sums(std::int64_t M) {
  return clusters(M);
}

void product_rms_norm_gradients(const ProductRmsNormGradients& p, cudaStream_t stream) {
  Work work{.x = matrix_map(p.dy, p.M, p.K, kRows, 1),
            .weight = matrix_map(p.weight, p.K, kD, kDepth, kColumns / 64),
            .h = p.sum,
            .d_sum = p.d_sum,
            .factor = p.factor,
            .rstd = p.rstd,
            .to = p.dx,
            .of_rows = p.d_factor,
            .rounded = p.d_added};
  launch<false>(work, p.M, p.K, stream);
}

}  // namespace megalodon::ops::cuda
