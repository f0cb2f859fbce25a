#include <algorithm>
#include <numbers>

#include "ops/attention/cuda.h"
#include "ops/cuda_device.h"

// Attention of short chunks and narrow heads, whose cost is the memory's: a block takes one head of one chunk
// and holds all its rows in shared memory, so that each is read once. A warp takes strips of 16 rows of the
// matrix of scores, and of a strip tiles of 16 columns, with tensor cores. The backward pass makes the scores
// twice, by strips of queries for dq and by strips of keys for dk and dv: no sum crosses warps.
namespace megalodon::ops::cuda {
namespace {

constexpr int kTile = 16;
constexpr int kMostLength = 256;
constexpr int kMostWarps = 8;
constexpr float kLog2E = std::numbers::log2e_v<float>;

// Of a strip [16, 8 n] in fragments: the lane has rows `row` and `row` + 8, of each 8 columns 2 `column` and
// the next.
struct Lane {
  int index = static_cast<int>(threadIdx.x) % 32, row = index / 4, column = index % 4;
};

// c [16, 8] += a [16, 16] b [16, 8].
__device__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ std::uint32_t pair(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}

// Rows of D numbers of a head in memory; those from `count` on are zeros.
template <class T>
struct Rows {
  T* first;
  std::int64_t step;
  int count;

  __device__ T* pack(int row, int i) const { return first + row * step + 8 * i; }
  __device__ uint4 read(int row, int i) const {
    return row < count ? __ldg(reinterpret_cast<const uint4*>(pack(row, i))) : uint4{};
  }
};

// Rows of D numbers in shared memory, in packs of 8 in an order in which neither the same pack of 8 rows nor
// 4 packs of 2 rows share a bank.
template <int D>
struct Matrix {
  static constexpr int kPacks = D / 8;
  uint4* packs;

  __device__ uint4& at(int row, int pack) const {
    const int turn = (row >> 1 & 3) | (kPacks % 8 == 0 ? (row & 1) << 2 : 0);
    return packs[row * kPacks + (pack ^ turn)];
  }
  __device__ Matrix after(int rows) const { return {packs + rows * kPacks}; }

  // Starts the block's copies of the first `rows` rows.
  __device__ void fetch(const Rows<const Bfloat16>& from, int rows) const {
    const int together = static_cast<int>(blockDim.x) / kPacks, pack = static_cast<int>(threadIdx.x) % kPacks;
    int row = static_cast<int>(threadIdx.x) / kPacks;
    if (row >= together) return;
    for (const Bfloat16* pointer = from.pack(row, pack); row < rows; row += together) {
      const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(&at(row, pack)));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(pointer),
                   "r"(row < from.count ? 16 : 0)
                   : "memory");
      pointer += together * from.step;
    }
  }
};

// Waits for all copies of the block.
__device__ void finish_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

// Four matrices of 8 rows of a pack, lane i giving the place of row i % 8 of matrix i / 8; transposed, where
// they are the right side of a product over their rows.
template <bool kTransposed>
__device__ void load_matrices(const uint4& place, std::uint32_t (&to)[4]) {
  const auto from = static_cast<std::uint32_t>(__cvta_generic_to_shared(&place));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// 16 rows as the left side of products over their D columns.
template <int D>
struct Strip {
  std::uint32_t a[D / 16][4];

  // The rows of x from `first` on.
  __device__ Strip(const Matrix<D>& x, int first) {
    const Lane lane;
#pragma unroll
    for (int j = 0; j < D / 16; ++j)
      load_matrices<false>(x.at(first + lane.index % 16, 2 * j + lane.index / 16), a[j]);
  }

  // [16, 16]: the products with 16 rows from `row` on.
  __device__ void products(const Matrix<D>& x, int row, float (&c)[2][4]) const {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] = 0;
    }
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      std::uint32_t b[4];
      load_matrices<false>(x.at(row + lane.index / 16 * 8 + lane.index % 8, 2 * j + lane.index / 8 % 2), b);
      multiply_add(c[0], a[j], b[0], b[1]);
      multiply_add(c[1], a[j], b[2], b[3]);
    }
  }
};

// A strip [16, D] of sums.
template <int D>
struct Sums {
  float c[D / 8][4] = {};

  // += w [16, 16] x, for the 16 rows of x from `row` on.
  __device__ void add(const float (&w)[2][4], const Matrix<D>& x, int row) {
    const std::uint32_t a[4] = {pair(w[0][0], w[0][1]), pair(w[0][2], w[0][3]), pair(w[1][0], w[1][1]),
                                pair(w[1][2], w[1][3])};
    const Lane lane;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      std::uint32_t b[4];
      load_matrices<true>(x.at(row + lane.index % 16, j + lane.index / 16), b);
      multiply_add(c[j], a, b[0], b[1]);
      multiply_add(c[j + 1], a, b[2], b[3]);
    }
  }
  // Rows `row` and `row` + 8 of the lane times their factors.
  __device__ void scale(const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] *= factor[i / 2];
    }
  }
  // The strip to rows `first` .. of `to`; its four lanes exchange what each has of a row for whole packs.
  __device__ void write(const Rows<Bfloat16>& to, int first) const {
    const Lane lane;
    const bool odd = lane.column % 2, high = lane.column / 2;
    const auto exchange = [](std::uint32_t& x, std::uint32_t& y, bool second, int distance) {
      const std::uint32_t other = __shfl_xor_sync(~0u, second ? x : y, distance);
      (second ? x : y) = other;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane.row + 8 * half;
#pragma unroll
      for (int m = 0; m < D / 32; ++m) {
        std::uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = pair(c[4 * m + j][2 * half], c[4 * m + j][2 * half + 1]);
        exchange(w[0], w[1], odd, 1);
        exchange(w[2], w[3], odd, 1);
        exchange(w[0], w[2], high, 2);
        exchange(w[1], w[3], high, 2);
        if (row < to.count)
          __stwb(reinterpret_cast<uint4*>(to.pack(row, 4 * m + lane.column)),
                 make_uint4(w[0], w[1], w[2], w[3]));
      }
    }
  }
};

// The block's head of its chunk.
struct Head {
  const SmallSizes& s;
  unsigned H = static_cast<unsigned>(s.H), h = blockIdx.x % H;
  std::int64_t position = s.first + blockIdx.x / H * s.step;
  int length = static_cast<int>(s.length), strips = (length + kTile - 1) / kTile;

  // Of x [positions, heads, D].
  template <int D, class T>
  __device__ Rows<T> rows(T* x, std::int64_t heads) const {
    return {x + (position * heads + h / (H / static_cast<unsigned>(heads))) * D, heads * D, length};
  }
  // The number of a query in an array [positions, H].
  __device__ std::int64_t number(int query) const { return (position + query) * s.H + h; }

  // f(strip) for the strips of the warp. Their work grows or falls with their numbers: the warps take turns
  // there and back.
  template <class F>
  __device__ void for_strips(F&& f) const {
    const int warps = static_cast<int>(blockDim.x) / 32,
              warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
    for (int turn = 0;; ++turn) {
      const int strip = turn * warps + (turn % 2 == 0 ? warp : warps - 1 - warp);
      if (strip >= strips) break;
      f(strip);
    }
  }
};

// f(value, row, column) for the lane's values of a tile.
template <class F>
__device__ void for_tile(float (&c)[2][4], F&& f) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(c[n][i], i / 2, lane.row + i / 2 * 8, 8 * n + 2 * lane.column + i % 2);
  }
}

template <int D>
__global__ void __maxnreg__(D <= 64 ? 128 : 168)
    forward(SmallSizes s, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v, Bfloat16* o, float* lse) {
  extern __shared__ uint4 memory[];
  const Head head{s};
  const int rows = head.strips * kTile;
  const Matrix<D> queries{memory}, keys = queries.after(rows), values = keys.after(rows);
  queries.fetch(head.rows<D>(q, s.H), rows);
  keys.fetch(head.rows<D>(k, s.Hkv), rows);
  values.fetch(head.rows<D>(v, s.Hkv), rows);
  finish_copies();
  const Lane lane;
  const float factor = s.scale * kLog2E;
  head.for_strips([&](int strip) {
    const Strip<D> query(queries, strip * kTile);
    Sums<D> sums;
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of the scores, as powers of two
#pragma unroll 1
    for (int tile = 0; tile <= strip; ++tile) {
      float w[2][4], now[2] = {largest[0], largest[1]}, kept[2];
      query.products(keys, tile * kTile, w);
      for_tile(w, [&](float& x, int half, int row, int column) {
        x = tile == strip && column > row ? -INFINITY : x * factor;
        now[half] = fmaxf(now[half], x);
      });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 1));
        now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 2));
        kept[half] = power_of_two(largest[half] - now[half]);
        largest[half] = now[half];
        total[half] *= kept[half];
      }
      for_tile(w, [&](float& x, int half, int, int) {
        x = power_of_two(x - now[half]);
        total[half] += x;
      });
      sums.scale(kept);
      sums.add(w, values, tile * kTile);
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      factors[half] = __fdividef(1, total[half]);
      const int row = strip * kTile + lane.row + 8 * half;
      if (lane.column == 0 && row < head.length)
        lse[head.number(row)] = (largest[half] + __log2f(total[half])) * std::numbers::ln2_v<float>;
    }
    sums.scale(factors);
    sums.write(head.rows<D>(o, s.H), strip * kTile);
  });
}

__device__ float product(std::uint32_t a, std::uint32_t b) {
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xffff0000) * __uint_as_float(b & 0xffff0000);
}

template <int D>
struct Shared {
  Matrix<D> queries, keys, values, gradients;
  float *log_sums, *deltas;  // of each query: lse for powers of two, the product of o and d_o

  __device__ Shared(uint4* memory, int rows)
      : queries{memory},
        keys(queries.after(rows)),
        values(keys.after(rows)),
        gradients(values.after(rows)),
        log_sums(reinterpret_cast<float*>(gradients.after(rows).packs)),
        deltas(log_sums + rows) {}
  static std::int64_t bytes(std::int64_t rows) { return rows * (4 * D * 2 + 2 * 4); }
};

// The lane's rows of d_o go to shared memory through registers, beside those of o.
template <int D>
__device__ void prepare_rows(const Head& head, const Shared<D>& x, const Bfloat16* o, const float* lse,
                             const Bfloat16* d_o, int strip) {
  const auto outputs = head.rows<D>(o, head.s.H), gradients = head.rows<D>(d_o, head.s.H);
  const Lane lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip * kTile + lane.row + 8 * half;
    const float log_sum = row < head.length ? __ldg(lse + head.number(row)) : 0;
    float delta = 0;
#pragma unroll
    for (int m = 0; m < D / 32; ++m) {
      const int pack = 4 * m + lane.column;
      const uint4 a = gradients.read(row, pack), b = outputs.read(row, pack);
      delta += product(a.x, b.x) + product(a.y, b.y) + product(a.z, b.z) + product(a.w, b.w);
      x.gradients.at(row, pack) = a;
    }
    delta += __shfl_xor_sync(~0u, delta, 1);
    delta += __shfl_xor_sync(~0u, delta, 2);
    if (lane.column == 0) x.log_sums[row] = log_sum * kLog2E, x.deltas[row] = delta;
  }
}

template <int D>
__device__ void backward_queries(const Head& head, const Shared<D>& x, Bfloat16* dq, int strip) {
  const float scale = head.s.scale;
  const int first = strip * kTile;
  const Strip<D> query(x.queries, first), gradient(x.gradients, first);
  const Lane lane;
  const float log_sum[2] = {x.log_sums[first + lane.row], x.log_sums[first + lane.row + 8]};
  const float delta[2] = {x.deltas[first + lane.row], x.deltas[first + lane.row + 8]};
  Sums<D> sums;
#pragma unroll 1
  for (int tile = 0; tile <= strip; ++tile) {
    float w[2][4], d[2][4];
    query.products(x.keys, tile * kTile, w);
    gradient.products(x.values, tile * kTile, d);
    for_tile(w, [&](float& s, int half, int row, int column) {
      s = tile == strip && column > row ? 0 : power_of_two(s * scale * kLog2E - log_sum[half]);
    });
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] = w[n][i] * (d[n][i] - delta[i / 2]);
    }
    sums.add(d, x.keys, tile * kTile);
  }
  sums.scale({scale, scale});
  sums.write(head.rows<D>(dq, head.s.H), first);
}

template <int D>
__device__ void backward_keys(const Head& head, const Shared<D>& x, Bfloat16* dk, Bfloat16* dv, int strip) {
  const float scale = head.s.scale;
  const int first = strip * kTile;
  const Strip<D> key(x.keys, first), value(x.values, first);
  const Lane lane;
  Sums<D> key_sums, value_sums;
#pragma unroll 1
  for (int tile = strip; tile < head.strips; ++tile) {  // of queries: the scores' columns
    float w[2][4], d[2][4];
    key.products(x.queries, tile * kTile, w);
    value.products(x.gradients, tile * kTile, d);
    float2 log_sum[2], delta[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = tile * kTile + 8 * n + 2 * lane.column;
      log_sum[n] = *reinterpret_cast<const float2*>(x.log_sums + query);
      delta[n] = *reinterpret_cast<const float2*>(x.deltas + query);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane.row + i / 2 * 8, column = 8 * n + 2 * lane.column + i % 2;
        const float log = i % 2 == 0 ? log_sum[n].x : log_sum[n].y;
        w[n][i] = tile == strip && row > column ? 0 : power_of_two(w[n][i] * scale * kLog2E - log);
        d[n][i] = w[n][i] * (d[n][i] - (i % 2 == 0 ? delta[n].x : delta[n].y));
      }
    }
    value_sums.add(w, x.gradients, tile * kTile);
    key_sums.add(d, x.queries, tile * kTile);
  }
  key_sums.scale({scale, scale});
  key_sums.write(head.rows<D>(dk, head.s.H), first);
  value_sums.write(head.rows<D>(dv, head.s.H), first);
}

template <int D>
__global__ void __maxnreg__(D <= 64 ? 168 : 255)
    backward(SmallSizes s, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v, const Bfloat16* o,
             const float* lse, const Bfloat16* d_o, Bfloat16* dq, Bfloat16* dk, Bfloat16* dv) {
  extern __shared__ uint4 memory[];
  const Head head{s};
  const int rows = head.strips * kTile;
  const Shared<D> x(memory, rows);
  x.queries.fetch(head.rows<D>(q, s.H), rows);
  x.keys.fetch(head.rows<D>(k, s.Hkv), rows);
  x.values.fetch(head.rows<D>(v, s.Hkv), rows);
  head.for_strips([&](int strip) { prepare_rows(head, x, o, lse, d_o, strip); });
  finish_copies();
  head.for_strips([&](int strip) { backward_queries(head, x, dq, strip); });
  head.for_strips([&](int strip) { backward_keys(head, x, dk, dv, strip); });
}

std::int64_t rows_of(std::int64_t length) {
  return ceil_div(length, kTile) * kTile;
}

unsigned threads_of(const SmallSizes& s) {
  const auto strips = ceil_div(s.length, kTile);
  return static_cast<unsigned>(32 * (strips > kMostWarps ? kMostWarps : std::min<std::int64_t>(strips, 4)));
}

template <class F>
bool with_width(std::int64_t width, F&& f) {
  switch (width) {
    case 32:
      f(Width<32>{});
      return true;
    case 64:
      f(Width<64>{});
      return true;
    case 96:
      f(Width<96>{});
      return true;
    case 128:
      f(Width<128>{});
      return true;
    default:
      return false;
  }
}

}  // namespace

bool has_small_kernels(std::int64_t width, std::int64_t length) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  bool fits = false;
  return length <= kMostLength &&
         with_width(width, [&]<int D>(Width<D>) { fits = Shared<D>::bytes(rows_of(length)) <= most; }) &&
         fits;
}

void small_forward(const SmallSizes& s, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v, Bfloat16* o,
                   float* lse, cudaStream_t stream) {
  with_width(s.width, [&]<int D>(Width<D>) {
    const auto bytes = static_cast<std::size_t>(3 * rows_of(s.length) * D * 2);
    allow_shared_memory(forward<D>, bytes);
    forward<D><<<grid_size(s.count * s.H), threads_of(s), bytes, stream>>>(s, q, k, v, o, lse);
  });
}

void small_backward(const SmallSizes& s, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
                    const Bfloat16* o, const float* lse, const Bfloat16* d_o, Bfloat16* dq, Bfloat16* dk,
                    Bfloat16* dv, cudaStream_t stream) {
  with_width(s.width, [&]<int D>(Width<D>) {
    const auto bytes = static_cast<std::size_t>(Shared<D>::bytes(rows_of(s.length)));
    allow_shared_memory(backward<D>, bytes);
    backward<D>
        <<<grid_size(s.count * s.H), threads_of(s), bytes, stream>>>(s, q, k, v, o, lse, d_o, dq, dk, dv);
  });
}

}  // namespace megalodon::ops::cuda
