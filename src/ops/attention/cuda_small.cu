#include <algorithm>
#include <numbers>
#include <type_traits>

#include "ops/attention/cuda.h"
#include "ops/cuda_device.h"
#include "ops/cuda_mma.h"

// Attention of short chunks and narrow heads, whose cost is the memory's: a block takes one head of one chunk
// and holds all its rows in shared memory, so that each is read once. A warp takes strips of 16 rows of the
// matrix of scores, and of a strip tiles of 16 columns, with tensor cores. The backward pass of up to
// kMostShort rows makes scores and their gradients once, in shared memory; that of more makes them twice, by
// strips of queries for dq and by strips of keys for dk and dv: no sum crosses warps.
namespace megalodon::ops::cuda {
namespace {

constexpr int kTile = 16;
constexpr int kWarps = 8;               // of a block of up to 2 kWarps strips
constexpr int kShort = 4, kMedium = 8;  // strips of short and of medium chunks
constexpr int kTogether = kShort;       // tiles that forward() takes at once
// Rows of a chunk: as many as shared memory holds, and registers for a warp to every two strips.
constexpr std::int64_t most_length(std::int64_t width) {
  return width <= 64 ? 432 : 256;
}
constexpr float kLog2E = std::numbers::log2e_v<float>;

// Of a strip [16, 8 n] in fragments: the lane has rows `row` and `row` + 8, of each 8 columns 2 `column` and
// the next.
struct Lane {
  int index = static_cast<int>(threadIdx.x % 32), row = index / 4, column = index % 4;
};

__device__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rows of D numbers of a head in memory, `count` of them.
template <class T>
struct Rows {
  T* first;
  unsigned step, count;

  // Within 4 GB of the first: by offsets of 32 bits, which take half the instructions.
  __device__ T* pack(unsigned row, unsigned i) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + (16 * i + row * (2 * step)));
  }
};

// Rows of D numbers in shared memory, in packs of 8 whose order within runs of kTurned changes from row to
// row: neither the same pack of 8 rows nor 4 packs of 2 rows share a bank.
template <int D>
struct Matrix {
  static constexpr int kPacks = D / 8, kTurned = kPacks % 8 == 0 ? 8 : 4;
  uint4* packs;  // at a multiple of 128 bytes

  __device__ static int place(int row, int pack) {
    const int turn = (row >> 1 & 3) | (kTurned == 8 ? (row & 1) << 2 : 0);
    return row * kPacks + (pack ^ turn);
  }
  __device__ uint4& at(int row, int pack) const { return packs[place(row, pack)]; }
  // Where the pack 2 j + `pack`, 0 or 1, of row `first` + `row` is; 8 divides `first`.
  __device__ std::uint32_t address(int first, int row, int pack, int j = 0) const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(packs + first * kPacks)) +
           (16 * place(row, pack) ^ 2 * j % kTurned * 16) + 2 * j / kTurned * kTurned * 16;
  }
  __device__ Matrix after(int rows) const { return {packs + rows * kPacks}; }

  static constexpr int kOfLane = kTile * kPacks / 32;  // packs of a strip

  // f(i, place, row, pack) for the lane's packs of 16 rows, those of a row by neighbouring lanes: whole lines
  // of memory.
  template <class F>
  __device__ static void for_packs(F&& f) {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const unsigned number = lane + 32 * i, row = number / kPacks, pack = number % kPacks;
      if constexpr (32 % kPacks == 0) {  // bit by bit
        f(i, place(lane / kPacks, pack) ^ place(32 / kPacks * i, 0), row, pack);
      } else {
        f(i, place(row, pack), row, pack);
      }
    }
  }
  // Starts the warp's copies of a strip's rows; those that are not there become zeros.
  __device__ void fetch(const Rows<const Bfloat16>& from, int strip) const {
    const unsigned first = strip * kTile;
    const auto here = static_cast<std::uint32_t>(__cvta_generic_to_shared(packs + first * kPacks));
    for_packs([&](int, int place, unsigned row, unsigned pack) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(here + 16 * place),
                   "l"(from.pack(first + row, pack)), "r"(first + row < from.count ? 16 : 0)
                   : "memory");
    });
  }
  // A strip's rows to memory, those that are there.
  __device__ void write(const Rows<Bfloat16>& to, int strip) const {
    const unsigned first = strip * kTile;
    uint4 from[kOfLane];
    for_packs([&](int i, int place, unsigned, unsigned) { from[i] = packs[first * kPacks + place]; });
    for_packs([&](int i, int, unsigned row, unsigned pack) {
      if (first + row < to.count) __stwb(reinterpret_cast<uint4*>(to.pack(first + row, pack)), from[i]);
    });
  }
};

// Waits for all copies of the block.
__device__ void finish_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

// A tile as the left side of a product.
__device__ void pack_tile(const float (*w)[4], std::uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack(w[i / 2][i % 2 * 2], w[i / 2][i % 2 * 2 + 1]);
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
      load_matrices<false>(a[j], x.address(first, lane.index % 16, lane.index / 16, j));
  }

  // kTiles tiles [16, 16]: the products with the rows from `row` on.
  template <int kTiles>
  __device__ void products(const Matrix<D>& x, int row, float (*c)[2][4]) const {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) c[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        std::uint32_t b[4];
        load_matrices<false>(
            b, x.address(row + t * kTile, lane.index / 16 * 8 + lane.index % 8, lane.index / 8 % 2, j));
        multiply_add(c[t][0], a[j], b[0], b[1]);
        multiply_add(c[t][1], a[j], b[2], b[3]);
      }
    }
  }
  __device__ void products(const Matrix<D>& x, int row, float (&c)[2][4]) const { products<1>(x, row, &c); }
};

// A strip [16, D] of sums.
template <int D>
struct Sums {
  float c[D / 8][4] = {};

  // += w [16, 16] x, for the 16 rows of x from `row` on.
  __device__ void add(const float (&w)[2][4], const Matrix<D>& x, int row) {
    std::uint32_t a[4];
    pack_tile(w, a);
    add(a, x, row);
  }
  __device__ void add(const std::uint32_t (&a)[4], const Matrix<D>& x, int row) {
    const Lane lane;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      std::uint32_t b[4];
      load_matrices<true>(b, x.address(row, lane.index % 16, lane.index / 16, j));
      multiply_add(c[2 * j], a, b[0], b[1]);
      multiply_add(c[2 * j + 1], a, b[2], b[3]);
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
  // To a strip of x that the warp has for itself, and from there to that of `to`.
  __device__ void write(const Rows<Bfloat16>& to, const Matrix<D>& x, int strip) const {
    const Lane lane;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      std::uint32_t words[4];
      pack_tile(c + 2 * j, words);
      store_matrices<false>(words, x.address(strip * kTile, lane.index % 16, lane.index / 16, j));
    }
    __syncwarp();
    x.write(to, strip);
  }
  // The strip to rows `first` .. of `to`. Of two packs the even lanes take the first, the odd ones the
  // second, so that each has 8 bytes and the four of a row 32 neighbouring ones.
  __device__ void write(const Rows<Bfloat16>& to, int first) const {
    const Lane lane;
    const int odd = lane.column % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = first + lane.row + 8 * half;
      Bfloat16* const place = to.pack(row, odd) + 2 * (lane.column - odd);
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        std::uint32_t low = pack(c[j][2 * half], c[j][2 * half + 1]),
                      high = pack(c[j + 1][2 * half], c[j + 1][2 * half + 1]);
        const std::uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
        (odd ? low : high) = other;
        if (row < to.count) __stwb(reinterpret_cast<uint2*>(place + 8 * j), make_uint2(low, high));
      }
    }
  }
};

// The block's head of its chunk.
struct Head {
  const SmallSizes& s;
  unsigned h = blockIdx.x, of_key = s.Hkv == s.H ? h : h / (gridDim.x / static_cast<unsigned>(s.Hkv));
  std::int64_t chunk = blockIdx.y + std::int64_t{blockIdx.z} * gridDim.y;
  bool there = chunk < s.count;
  std::int64_t position = !there ? 0 : s.borders ? s.borders[chunk] : s.first + chunk * s.step;
  int length = !there      ? 0
               : s.borders ? s.borders[chunk + 1] - static_cast<int>(position)
                           : static_cast<int>(s.length),
      strips = (length + kTile - 1) / kTile;

  static dim3 grid(const SmallSizes& s) {
    const auto columns = std::min<std::int64_t>(s.count, 32768);
    return {static_cast<unsigned>(s.H), static_cast<unsigned>(columns),
            static_cast<unsigned>(ceil_div(s.count, columns))};
  }

  // Of one of the heads of x.
  template <int D, class T>
  __device__ Rows<T> rows(const SmallHeads<T>& x, unsigned head) const {
    return {x.first + position * x.row + head * D, static_cast<unsigned>(x.row),
            static_cast<unsigned>(length)};
  }
  // Of x [positions, H, D].
  template <int D, class T>
  __device__ Rows<T> rows(T* x) const {
    return rows<D>(SmallHeads<T>{x, s.H * D}, h);
  }
  // The number of a query in an array [positions, H].
  template <class T>
  __device__ T* number(T* first, int query) const {
    return first + position * s.H + h + query * static_cast<int>(s.H);
  }

  // f(strip) for the strips of the warp. Their work grows or falls with their numbers: the warps take turns
  // there and back. kOnce: there are no more strips than warps.
  template <bool kOnce = false, class F>
  __device__ void for_strips(F&& f) const {
    const int warps = static_cast<int>(blockDim.x) / 32,
              warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
    if constexpr (kOnce) {
      if (warp < strips) f(warp);
    } else {
      for (int turn = 0;; ++turn) {
        const int strip = turn * warps + (turn % 2 == 0 ? warp : warps - 1 - warp);
        if (strip >= strips) break;
        f(strip);
      }
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

// f(value, half, hidden) for the lane's values of two tiles, of which the first stands `before` tiles before
// the diagonal.
template <class F>
__device__ void for_pair(float (*c)[2][4], int before, F&& f) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int seen = (before - t) * kTile;
    for_tile(c[t], [&](float& x, int half, int row, int column) { f(x, half, column - row > seen); });
  }
}

// Tiles of a strip are taken by kTogether, so that their products stand beside each other and the largest
// score is looked for once. kOnce: no strip has more.
template <int D, bool kOnce>
__global__ void __maxnreg__(D <= 64 ? (kOnce ? 72 : 128) : 168)
    forward(SmallSizes s, SmallInputs in, Bfloat16* o, float* lse) {
  extern __shared__ __align__(128) uint4 memory[];
  const Head head{s};
  const int rows = head.strips * kTile;
  const Matrix<D> queries{memory}, keys = queries.after(rows), values = keys.after(rows);
  head.for_strips<kOnce>([&](int strip) {
    queries.fetch(head.rows<D>(in.q, head.h), strip);
    keys.fetch(head.rows<D>(in.k, head.of_key), strip);
    values.fetch(head.rows<D>(in.v, head.of_key), strip);
  });
  finish_copies();
  const Lane lane;
  const float factor = s.scale * kLog2E;
  head.for_strips<kOnce>([&](int strip) {
    const Strip<D> query(queries, strip * kTile);
    Sums<D> sums;
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of the scores, as powers of two
    const auto add_tiles = [&](int first) {
      float scores[kTogether][2][4], now[2] = {largest[0], largest[1]};
      const auto for_pairs = [&](auto&& f) {
#pragma unroll
        for (int t = 0; t < kTogether; t += 2) {
          if (t == 0 || first + t <= strip) f(t);
        }
      };
      for_pairs([&](int t) { query.template products<2>(keys, (first + t) * kTile, scores + t); });
      for_pairs([&](int t) {
        for_pair(scores + t, strip - first - t, [&](float& score, int half, bool hidden) {
          score = hidden ? -INFINITY : score * factor;
          now[half] = fmaxf(now[half], score);
        });
      });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 1));
        now[half] = fmaxf(now[half], __shfl_xor_sync(~0u, now[half], 2));
      }
      if constexpr (!kOnce) {
        const float kept[2] = {power_of_two(largest[0] - now[0]), power_of_two(largest[1] - now[1])};
        sums.scale(kept);
        total[0] *= kept[0], total[1] *= kept[1];
      }
      largest[0] = now[0], largest[1] = now[1];
      for_pairs([&](int t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          for_tile(scores[t + i], [&](float& score, int half, int, int) {
            score = power_of_two(score - now[half]);
            total[half] += score;
          });
        }
        sums.add(scores[t], values, (first + t) * kTile);
        if (first + t < strip) sums.add(scores[t + 1], values, (first + t + 1) * kTile);
      });
    };
    if constexpr (kOnce) {
      add_tiles(0);
    } else {
#pragma unroll 1
      for (int first = 0; first <= strip; first += kTogether) add_tiles(first);
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      factors[half] = __fdividef(1, total[half]);
      const int row = strip * kTile + lane.row + 8 * half;
      if (lane.column == 0 && row < head.length)
        *head.number(lse, row) = (largest[half] + __log2f(total[half])) * std::numbers::ln2_v<float>;
    }
    sums.scale(factors);
    sums.write(head.rows<D>(o), queries, strip);
  });
}

__device__ float product(std::uint32_t a, std::uint32_t b) {
  return low(a) * low(b) + high(a) * high(b);
}

template <int D>
struct Shared {
  Matrix<D> queries, keys, values, gradients;
  float2* numbers;  // of each query: lse for powers of two, the product of o and d_o

  __device__ Shared(uint4* memory, int rows)
      : queries{memory},
        keys(queries.after(rows)),
        values(keys.after(rows)),
        gradients(values.after(rows)),
        numbers(reinterpret_cast<float2*>(gradients.after(rows).packs)) {}
  static std::int64_t bytes(std::int64_t rows) { return rows * (4 * D * 2 + 2 * 4); }
};

// The lane's rows of d_o go to shared memory through registers, beside those of o.
template <int D>
__device__ void prepare_rows(const Head& head, const Shared<D>& x, const Bfloat16* o, const float* lse,
                             const Bfloat16* d_o, int strip) {
  const auto outputs = head.rows<D>(o), gradients = head.rows<D>(d_o);
  const Lane lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip * kTile + lane.row + 8 * half;
    const bool there = row < head.length;
    const auto read = [&](const Bfloat16* pack) {
      return there ? __ldg(reinterpret_cast<const uint4*>(pack)) : uint4{};
    };
    const Bfloat16* const gradient = gradients.pack(row, lane.column);
    const Bfloat16* const output = outputs.pack(row, lane.column);
    const float log_sum = there ? __ldg(head.number(lse, row)) : 0;
    float delta = 0;
#pragma unroll
    for (int m = 0; m < D / 32; ++m) {
      const uint4 a = read(gradient + 32 * m), b = read(output + 32 * m);
      delta += product(a.x, b.x) + product(a.y, b.y) + product(a.z, b.z) + product(a.w, b.w);
      x.gradients.at(row, 4 * m + lane.column) = a;
    }
    delta += __shfl_xor_sync(~0u, delta, 1);
    delta += __shfl_xor_sync(~0u, delta, 2);
    if (lane.column == 0) x.numbers[row] = make_float2(log_sum * kLog2E, delta);
  }
}

template <int D>
__device__ void backward_queries(const Head& head, const Shared<D>& x, const SmallHeads<Bfloat16>& dq,
                                 int strip) {
  const float scale = head.s.scale;
  const int first = strip * kTile;
  const Strip<D> query(x.queries, first), gradient(x.gradients, first);
  const Lane lane;
  const float2 numbers[2] = {x.numbers[first + lane.row], x.numbers[first + lane.row + 8]};
  Sums<D> sums;
  const auto add_tile = [&]<bool kDiagonal>(int tile, std::bool_constant<kDiagonal>) {
    float w[2][4], d[2][4];
    query.products(x.keys, tile * kTile, w);
    gradient.products(x.values, tile * kTile, d);
    for_tile(w, [&](float& s, int half, int row, int column) {
      s = kDiagonal && column > row ? 0 : power_of_two(s * scale * kLog2E - numbers[half].x);
    });
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] = w[n][i] * (d[n][i] - numbers[i / 2].y);
    }
    sums.add(d, x.keys, tile * kTile);
  };
#pragma unroll 1
  for (int tile = 0; tile < strip; ++tile) add_tile(tile, std::false_type{});
  add_tile(strip, std::true_type{});
  sums.scale({scale, scale});
  sums.write(head.rows<D>(dq, head.h), first);
}

template <int D>
__device__ void backward_keys(const Head& head, const Shared<D>& x, const SmallHeads<Bfloat16>& dk,
                              const SmallHeads<Bfloat16>& dv, int strip) {
  const float scale = head.s.scale;
  const int first = strip * kTile;
  const Strip<D> key(x.keys, first), value(x.values, first);
  const Lane lane;
  Sums<D> key_sums, value_sums;
  // Of queries: the scores' columns.
  const auto add_tile = [&]<bool kDiagonal>(int tile, std::bool_constant<kDiagonal>) {
    float w[2][4], d[2][4];
    key.products(x.queries, tile * kTile, w);
    value.products(x.gradients, tile * kTile, d);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int query = 8 * n + 2 * lane.column;
      const float4 both = *reinterpret_cast<const float4*>(x.numbers + tile * kTile + query);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool hidden = kDiagonal && lane.row + i / 2 * 8 > query + i % 2;
        w[n][i] = hidden ? 0 : power_of_two(w[n][i] * scale * kLog2E - (i % 2 == 0 ? both.x : both.z));
        d[n][i] = w[n][i] * (d[n][i] - (i % 2 == 0 ? both.y : both.w));
      }
    }
    value_sums.add(w, x.gradients, tile * kTile);
    key_sums.add(d, x.queries, tile * kTile);
  };
  add_tile(strip, std::true_type{});
#pragma unroll 1
  for (int tile = strip + 1; tile < head.strips; ++tile) add_tile(tile, std::false_type{});
  key_sums.scale({scale, scale});
  key_sums.write(head.rows<D>(dk, head.h), first);
  value_sums.write(head.rows<D>(dv, head.h), first);
}

template <int D>
__global__ void __maxnreg__(D <= 64 ? 128 : 255)
    backward(SmallSizes s, SmallInputs in, const Bfloat16* o, const float* lse, const Bfloat16* d_o,
             SmallGradients out) {
  extern __shared__ __align__(128) uint4 memory[];
  const Head head{s};
  const int rows = head.strips * kTile;
  const Shared<D> x(memory, rows);
  head.for_strips([&](int strip) {
    x.queries.fetch(head.rows<D>(in.q, head.h), strip);
    x.keys.fetch(head.rows<D>(in.k, head.of_key), strip);
    x.values.fetch(head.rows<D>(in.v, head.of_key), strip);
  });
  head.for_strips([&](int strip) { prepare_rows(head, x, o, lse, d_o, strip); });
  finish_copies();
  head.for_strips([&](int strip) { backward_queries(head, x, out.dq, strip); });
  head.for_strips([&](int strip) { backward_keys(head, x, out.dk, out.dv, strip); });
}

// Tiles of a matrix of scores up to its diagonal, row after row, each as its quarters of 8 x 8.
struct Tiles {
  std::uint32_t* words;

  __host__ __device__ static constexpr int words_of(int strips) { return strips * (strips + 1) / 2 * 128; }
  // Where row `row` of a quarter of tile (i, j) is.
  __device__ std::uint32_t address(int i, int j, int quarter, int row) const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(words + words_of(i))) +
           16 * (j * 32 + quarter * 8 + row);
  }
  __device__ void put(int i, int j, const std::uint32_t (&a)[4]) const {
    const Lane lane;
    store_matrices<false>(a, address(i, j, lane.index / 8, lane.index % 8));
  }
  // Tile (i, j) as the left side of a product, or (j, i) transposed.
  template <bool kTransposed>
  __device__ void get(int i, int j, std::uint32_t (&a)[4]) const {
    const Lane lane;
    const int quarter = lane.index / 8;
    load_matrices<kTransposed>(
        a, address(kTransposed ? j : i, kTransposed ? i : j,
                   kTransposed ? quarter / 2 + quarter % 2 * 2 : quarter, lane.index % 8));
  }
};

template <int D>
struct ShortShared {
  Matrix<D> queries, keys, values, gradients;
  Tiles weights, scores;  // of the scores the gradients

  __device__ ShortShared(uint4* memory, int strips)
      : queries{memory},
        keys(queries.after(strips * kTile)),
        values(keys.after(strips * kTile)),
        gradients(values.after(strips * kTile)),
        weights{reinterpret_cast<std::uint32_t*>(gradients.after(strips * kTile).packs)},
        scores{weights.words + Tiles::words_of(strips)} {}
  static int bytes(int strips) { return 4 * strips * kTile * D * 2 + 2 * Tiles::words_of(strips) * 4; }
};

// A strip's weights and gradients of scores, of at most kStrips tiles. The product of o and d_o, which the
// softmax's gradient takes off, is the mean of the weights' gradients by the weights: of the rounded ones, so
// that what rounding does to their sum does not show.
template <int D, int kStrips>
__device__ void make_scores(const ShortShared<D>& x, const float (&log_sums)[2], float scale, int strip) {
  float d[kStrips][2][4], delta[2] = {}, total[2] = {};
  const auto for_pairs = [&](auto&& f) {
#pragma unroll
    for (int t = 0; t < kStrips; t += 2) {
      if (t == 0 || t <= strip) f(t);
    }
  };
  const auto put = [&](const Tiles& tiles, int t) {
    std::uint32_t packed[2][4];
    pack_tile(d[t], packed[0]), pack_tile(d[t + 1], packed[1]);
    tiles.put(strip, t, packed[0]);
    if (t < strip) tiles.put(strip, t + 1, packed[1]);
  };
  // f(value, half, weight) for the lane's values of d.
  const auto with_weights = [&](int t, auto&& f) {
    std::uint32_t weights[2][4] = {};
    x.weights.template get<false>(strip, t, weights[0]);
    if (t < strip) x.weights.template get<false>(strip, t + 1, weights[1]);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t both = weights[i / 8][i % 8 / 2];
      f(d[t + i / 8][i / 4 % 2][i % 4], i / 2 % 2, i % 2 == 0 ? low(both) : high(both));
    }
  };
  const Strip<D> query(x.queries, strip * kTile);
  for_pairs([&](int t) { query.template products<2>(x.keys, t * kTile, d + t); });
  for_pairs([&](int t) {
    for_pair(d + t, strip - t, [&](float& score, int half, bool hidden) {
      score = hidden ? 0 : power_of_two(score * (scale * kLog2E) - log_sums[half]);
    });
    put(x.weights, t);
  });
  __syncwarp();
  const Strip<D> gradient(x.gradients, strip * kTile);
  for_pairs([&](int t) { gradient.template products<2>(x.values, t * kTile, d + t); });
  for_pairs([&](int t) {
    with_weights(t, [&](float value, int half, float weight) {
      delta[half] += weight * value;
      total[half] += weight;
    });
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      delta[half] += __shfl_xor_sync(~0u, delta[half], distance);
      total[half] += __shfl_xor_sync(~0u, total[half], distance);
    }
    delta[half] = __fdividef(delta[half], total[half]);
  }
  for_pairs([&](int t) {
    with_weights(
        t, [&](float& value, int half, float weight) { value = weight * scale * (value - delta[half]); });
    put(x.scores, t);
  });
}

// Of a strip of the tiles, or of their transposed, from tile `first` to before `end`, the product with the
// rows of x; by way of `through`.
template <bool kTransposed, int D>
__device__ void write_product(const Tiles& tiles, const Matrix<D>& x, int strip, int first, int end,
                              const Matrix<D>& through, const Rows<Bfloat16>& to) {
  Sums<D> sums;
#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    std::uint32_t a[4];
    tiles.get<kTransposed>(strip, tile, a);
    sums.add(a, x, tile * kTile);
  }
  sums.write(to, through, strip);
}

// A warp to every strip, at most kStrips.
template <int D, int kStrips>
__global__ void __maxnreg__(D <= 64 ? (kStrips == kShort ? 80 : 128) : (kStrips == kShort ? 168 : 255))
    backward_short(SmallSizes s, SmallInputs in, const float* lse, const Bfloat16* d_o, SmallGradients out) {
  extern __shared__ __align__(128) uint4 memory[];
  const Head head{s};
  const ShortShared<D> x(memory, head.strips);
  float log_sums[2] = {};
  head.for_strips<true>([&](int strip) {
    x.queries.fetch(head.rows<D>(in.q, head.h), strip);
    x.keys.fetch(head.rows<D>(in.k, head.of_key), strip);
    x.gradients.fetch(head.rows<D>(d_o), strip);
    x.values.fetch(head.rows<D>(in.v, head.of_key), strip);
    const Lane lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = strip * kTile + lane.row + 8 * half;
      if (row < head.length) log_sums[half] = __ldg(head.number(lse, row)) * kLog2E;
    }
  });
  finish_copies();
  head.for_strips<true>([&](int strip) { make_scores<D, kStrips>(x, log_sums, s.scale, strip); });
  __syncthreads();
  head.for_strips<true>([&](int strip) {
    write_product<false>(x.scores, x.keys, strip, 0, strip + 1, x.values, head.rows<D>(out.dq, head.h));
    write_product<true>(x.scores, x.queries, strip, strip, head.strips, x.values,
                        head.rows<D>(out.dk, head.h));
    write_product<true>(x.weights, x.gradients, strip, strip, head.strips, x.values,
                        head.rows<D>(out.dv, head.h));
  });
}

std::int64_t rows_of(std::int64_t length) {
  return ceil_div(length, kTile) * kTile;
}

// Of a block: few warps, so that blocks which copy and blocks which compute are beside each other; more,
// where there are more than `few` strips and few blocks fill the shared memory. No warp has more than two
// strips then, so that all have as much to do.
unsigned threads_of(const SmallSizes& s, std::int64_t few) {
  const auto strips = ceil_div(s.length, kTile);
  const auto warps = strips > few ? std::max<std::int64_t>(kWarps, ceil_div(strips, 2)) : 4;
  return static_cast<unsigned>(32 * std::min(strips, warps));
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
  bool fits = false;
  const auto most = static_cast<std::int64_t>(most_shared_memory());
  return length <= most_length(width) &&
         with_width(width, [&]<int D>(Width<D>) { fits = Shared<D>::bytes(rows_of(length)) <= most; }) &&
         fits;
}

void small_forward(const SmallSizes& s, const SmallInputs& in, Bfloat16* o, float* lse, cudaStream_t stream) {
  with_width(s.width, [&]<int D>(Width<D>) {
    const auto bytes = static_cast<std::size_t>(3 * rows_of(s.length) * D * 2);
    const auto kernel = s.length <= kShort * kTile ? forward<D, true> : forward<D, false>;
    allow_all_shared_memory(kernel, bytes);
    kernel<<<Head::grid(s), threads_of(s, 8), bytes, stream>>>(s, in, o, lse);
  });
}

void small_backward(const SmallSizes& s, const SmallInputs& in, const Bfloat16* o, const float* lse,
                    const Bfloat16* d_o, const SmallGradients& out, cudaStream_t stream) {
  with_width(s.width, [&]<int D>(Width<D>) {
    const auto blocks = Head::grid(s);
    const auto strips = static_cast<int>(ceil_div(s.length, kTile));
    const auto short_bytes = static_cast<std::size_t>(ShortShared<D>::bytes(strips));
    if (strips <= kMedium && short_bytes <= most_shared_memory()) {
      const auto kernel = strips <= kShort ? backward_short<D, kShort> : backward_short<D, kMedium>;
      allow_all_shared_memory(kernel, short_bytes);
      kernel<<<blocks, static_cast<unsigned>(32 * strips), short_bytes, stream>>>(s, in, lse, d_o, out);
      return;
    }
    const auto bytes = static_cast<std::size_t>(Shared<D>::bytes(rows_of(s.length)));
    allow_shared_memory(backward<D>, bytes);  // its reads of o want a first cache
    backward<D><<<blocks, threads_of(s, 4), bytes, stream>>>(s, in, o, lse, d_o, out);
  });
}

}  // namespace megalodon::ops::cuda
