#include "ops/cema/cuda.h"
#include "ops/cema/cuda_gradients.h"
#include "ops/cema/cuda_tensor_core.h"
#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/cuda_step.h"

// CEMA in blocks of kBlock steps on the tensor cores. A warp has one feature of some sequences and goes
// through their time, a tile of kSteps at a time: forwards through x to y, or backwards through dy to dx,
// which is the same with time and the coefficients' places exchanged. With Q_n = conj(q_n), U [blocks, e] the
// tile's inputs, the last step of a block first, and Y its outputs, the first step first, three products of
// small matrices:
//   R = U P,            what each block adds to the states:   P [e, n] = Q_n^e
//   a' = Q^kBlock a + R, the states from block to block: a scan in float32
//   Y = U K + Z P',     Z [blocks, n] = p_n conj(eta_n) Q_n a_n before each block,
//                       K [e, j] = k_(j + e - 31), k_l = Re(sum_n p_n eta_n q_n^l), k_0 with omega added.
// Complex states are pairs of real columns. U is bfloat16. Forwards P is the sum of two bfloat16 matrices in
// R, so that the states are as in float32; elsewhere the matrices are rounded to bfloat16, as the outputs
// are. What is carried into a sequence decays beside the states. Backwards the gradients of the coefficients
// are summed (cuda_gradients.h) where states and inputs are at hand.
//
// Movers bring tiles into columns of features and take outputs out of them while the workers are at the tiles
// between: no warp waits for all others.
namespace megalodon::ops::cuda {
namespace {

// Tiles on their way from the device, of `kStreams` arrays.
template <bool kBack>
inline constexpr int kStages = kBack ? 2 : 4;
template <bool kBack>
inline constexpr int kStreams = kBack ? 2 : 1;
// Tiles in columns, waiting for workers or for movers.
template <bool kBack>
inline constexpr int kTiles = kBack ? 2 : 4;

inline constexpr int kZeros = 8;  // before the lags of a kernel
// Named barriers: of movers; backwards, where they have read all rows, whose memory workers take then.
[[maybe_unused]] inline constexpr int kMoved = 1, kAllRead = 2;

// Of a feature. The conjugate of p conj(eta) Q scales states.
struct Factors {
  Decays decays;
  Pair scale[kComponents];
};
struct Tables {
  uint4 powers[2][64];  // by half
  uint4 lags[32];       // K by its distances from the diagonal, 8 at a time
};

template <bool kBack>
struct Memory {
  Rows rows[kStages<kBack>][kStreams<kBack>];
  Rows leaving[2];
  Tables tables[kFeatures];
  Columns columns[kTiles<kBack>][kStreams<kBack>];
  Factors factors[kFeatures];
  float kernel[kFeatures][kZeros + kBlock];
  FeatureCoefficients coefficients[kFeatures];
  OfFirst of_first[kBack ? kFeatures : 1][kComponents];
  Barrier arrived[kStages<kBack>], filled[kTiles<kBack>], used[kTiles<kBack>];
};

// Tiles of sequences first, first + apart, .. in turn, in the direction of time that is gone through.
template <bool kBack>
struct Walk {
  int sequence, apart, tiles, tile = 0;  // tiles: of a sequence

  // From a sequence's first tile on.
  __device__ int left(int sequences) const {
    return static_cast<int>(static_cast<unsigned>(sequences - sequence + apart - 1) /
                            static_cast<unsigned>(apart)) *
           tiles;
  }

  __device__ int first_step() const { return kSteps * (kBack ? tiles - 1 - tile : tile); }
  __device__ bool is_first() const { return tile == 0; }
  __device__ bool is_last() const { return tile == tiles - 1; }
  __device__ void next() {
    sequence += is_last() ? apart : 0;
    tile = is_last() ? 0 : tile + 1;
  }
};

// The arrays of a launch: x, or dy and x; y or dx.
struct Arrays {
  Boxes in[2], out;
  bool has_outputs;
};

template <bool kBack>
class Mover {
 public:
  __device__ Mover(Memory<kBack>& memory, const Arrays& arrays, int feature, int sequences,
                   const Walk<kBack>& first)
      : memory_(memory),
        arrays_(arrays),
        feature_(feature),
        thread_(static_cast<int>(threadIdx.x % kMovers)),
        sequences_(sequences),
        coming_(first) {}

  // By one of the movers.
  __device__ void begin() {
    prefetch_map(arrays_.out);
    for (int stream = 0; stream < kStreams<kBack>; ++stream) prefetch_map(arrays_.in[stream]);
    wait_for_end_of_previous();
    fetch_until(kStages<kBack>);
  }
  __device__ void run(Walk<kBack> now) {
    const int tiles = now.left(sequences_);
#pragma unroll 1
    for (int i = -kTiles<kBack>; i < tiles; ++i) {  // the tile that workers leave
      if (thread_ == 0 && i == tiles - 1) let_next_start();
      Rows& rows = memory_.leaving[i & 1];
      if (i >= 0) {
        memory_.used[i % kTiles<kBack>].wait(i / kTiles<kBack>);
        if (arrays_.has_outputs)
          Move<kBack, kBack>{thread_ / 32, thread_ % 32}.to_rows(memory_.columns[i % kTiles<kBack>][0], rows);
      }
      if (i + kTiles<kBack> < tiles) fill(i + kTiles<kBack>);
      if (kBack && i + kTiles<kBack> == tiles - 1) named_arrive(kAllRead, kThreads);
      written_for_copies();
      if (thread_ == 0) wait_for_copies_back();  // of the tile before: the next one's rows are free
      named_wait(kMoved, kMovers);
      if (thread_ != 0) continue;
      if (i >= 0) {
        if (arrays_.has_outputs) send(now, rows);
        now.next();
      }
      fetch_until(i + 1 + kTiles<kBack> + kStages<kBack>);
    }
    if (thread_ == 0) wait_for_copies_back();
  }

 private:
  __device__ void fetch_until(int tiles) {
#pragma unroll 1
    for (; fetched_ < tiles && coming_.sequence < sequences_; ++fetched_, coming_.next()) {
      const int stage = fetched_ % kStages<kBack>;
      Barrier& arrived = memory_.arrived[stage];
      arrived.arrive_expecting(sizeof(memory_.rows[stage]));
#pragma unroll
      for (int stream = 0; stream < kStreams<kBack>; ++stream) {
#pragma unroll
        for (int step = 0; step < kSteps; step += kBoxSteps)
          copy_box(memory_.rows[stage][stream] + 2 * step, arrays_.in[stream], feature_,
                   coming_.first_step() + step, coming_.sequence, arrived);
      }
    }
  }
  // The i-th tile, from rows to columns.
  __device__ void fill(int i) const {
    const int stage = i % kStages<kBack>, to = i % kTiles<kBack>;
    memory_.arrived[stage].wait(i / kStages<kBack>);
    __syncwarp();  // the outputs before have been read
    Move<kBack, !kBack>{thread_ / 32, thread_ % 32}.to_columns(memory_.rows[stage][0],
                                                               memory_.columns[to][0]);
    if constexpr (kBack)
      Move<kBack, true>{thread_ / 32, thread_ % 32}.to_columns(memory_.rows[stage][1],
                                                               memory_.columns[to][1]);
    __syncwarp();
    if (thread_ % 32 == 0) memory_.filled[to].arrive();
  }
  __device__ void send(const Walk<kBack>& at, const Rows& rows) const {
#pragma unroll
    for (int step = 0; step < kSteps; step += kBoxSteps)
      copy_box_back(arrays_.out, feature_, at.first_step() + step, at.sequence, rows + 2 * step);
    commit_copies_back();
  }

  Memory<kBack>& memory_;
  const Arrays& arrays_;
  int feature_, thread_, sequences_, fetched_ = 0;
  Walk<kBack> coming_;  // the tile to be fetched
};

// a and b as sums of two bfloat16 numbers each, packed.
__device__ void split(float a, float b, std::uint32_t& high, std::uint32_t& low) {
  high = pack(a, b);
  low = pack(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000));
}

// Powers 2 (lane % 4), the next, and those 8, 16 and 24 higher, of component lane / 4: to shared memory, and
// what rounding left of them, as left-hand matrices. Added to lags with the weight p conj(eta).
[[maybe_unused]] __device__ void make_powers(Pair q, Pair weight, int lane, uint4 (&to)[64], Powers& low,
                                             float (&lags)[8]) {
  const Pair one{1, 0}, q2 = multiply(q, q), q4 = multiply(q2, q2), q8 = multiply(q4, q4);
  Pair even = multiply(lane % 2 == 1 ? q2 : one, lane / 2 % 2 == 1 ? q4 : one);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Pair odd = multiply(even, q);
    lags[2 * i] += multiply(weight, even).re, lags[2 * i + 1] += multiply(weight, odd).re;
    auto* const high = reinterpret_cast<std::uint32_t*>(to) + 64 * i + lane;
    split(even.re, odd.re, high[0], low[i / 2][i % 2 * 2]);
    split(even.im, odd.im, high[32], low[i / 2][i % 2 * 2 + 1]);
    even = multiply(even, q8);
  }
}

// A warp of workers: a feature.
template <bool kBack, bool kCarried>
class Worker {
 public:
  __device__ explicit Worker(Memory<kBack>& memory)
      : memory_(memory),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        tables_(shared_address(&memory.tables[warp_]) + 16 * lane_),
        left_(warp_ * kColumn + row_of_blocks<true>(lane_)),
        right_(warp_ * kColumn + row_of_blocks<false>(lane_)),
        first_steps_(pack(static_cast<float>(2 * (lane_ % 4)), static_cast<float>(2 * (lane_ % 4) + 1))) {
    if (kBack && lane_ < kComponents) memory.of_first[warp_][lane_] = {};
  }

  // From the coefficients: powers, lags, and what scans and states are multiplied with.
  __device__ void make_tables() {
    const FeatureCoefficients& c = memory_.coefficients[warp_];
    Tables& tables = memory_.tables[warp_];
    Factors& factors = memory_.factors[warp_];
    const int n = lane_ % kComponents;
    const Pair back = conjugate(c.q[n]);
    make_decays(back, n, factors.decays);
    factors.scale[n] = conjugate(multiply(c.weight(n), back));
    float lags[8] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      make_powers(nonzero(conjugate(c.q[component(half)])), c.weight(component(half)), lane_,
                  tables.powers[half], low_powers_[half], lags);
    }
    float (&kernel)[kZeros + kBlock] = memory_.kernel[warp_];
    const int row = lane_ / 4, column = lane_ % 4;
    if (lane_ < kZeros) kernel[lane_] = 0;
    kernel[kZeros + 8 * (row / 2) + 2 * column + row % 2] = sum_of_lanes(lags) + (lane_ == 0 ? c.omega : 0);
    __syncwarp();
    const auto words = [&](int distance) {
      const float* const at = &kernel[kZeros - 7 + 8 * distance + 2 * column + row];
      return pack(at[0], at[1]);
    };
    tables.lags[lane_] = {words(0), words(1), words(2), words(3)};
    __syncwarp();
    if constexpr (!kBack) {
      for (int pair = 0; pair < 2; ++pair) read_out_powers(pair, out_powers_[pair]);
    }
  }

  // first [B, D, N, 2] or null: what is carried into sequence row / D.
  __device__ void begin(const float* carried, std::int64_t row, int N) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      end_[half] = {};
      if constexpr (kCarried) carried_[half] = {read(carried, row, half, N)};
    }
  }
  // Outputs in the place of the inputs dy or x.
  __device__ void tile(const Columns (&columns)[kStreams<kBack>], bool has_outputs) {
    const std::uint32_t in = shared_address(columns[0]), of_x = shared_address(columns[kBack ? 1 : 0]);
    Blocks u;
    std::uint32_t z[2][4];
    if constexpr (kBack) lags_.add_blocks(of_x + left_, in + right_);
    read_blocks(in + right_, u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Powers powers, slopes;
      read_powers(tables_ + 1024 * half, powers);
      const Pair(*const decays)[kComponents] = decays_of(half);
      Run a, a_slope;
      float sum[2][4] = {};
      add_products(powers, u, sum);
      if constexpr (kBack) {
        make_slopes(powers, first_steps_, slopes);
        multiply_powers(slopes, u, a_slope);
      } else {
        add_products(low_powers_[half], u, sum);
      }
      to_run(sum, a);
      scan_blocks(a, a_slope, decays, end_[half], lane_);
      Run carried = {}, carried_slope = {};
      if constexpr (kCarried) scan_blocks(carried, carried_slope, decays, carried_[half], lane_);
      if constexpr (kBack) {
        Blocks x;
        read_blocks(of_x + right_, x);
        Run s, s_slope;
        multiply_powers(powers, x, s);
        multiply_powers(slopes, x, s_slope);
        Sums& sums = sums_[half];
        Sums::add_blocks(s, s_slope, a, a_slope, sums.value, sums.slope);
        if constexpr (kCarried)
          Sums::add_blocks(s, s_slope, carried, carried_slope, sums.carried, sums.carried_slope);
      }
      const Pair scale = memory_.factors[warp_].scale[component(half)];
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        a[k] = multiply(scale, conjugate(a[k]));
        if constexpr (kCarried) a[k] = multiply_add(conjugate(out_of(half)), conjugate(carried[k]), a[k]);
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        z[half][t] = transposed(pack(a[2 * t].re, a[2 * t + 1].re));
        z[half][2 + t] = transposed(pack(a[2 * t].im, a[2 * t + 1].im));
      }
    }
    if (has_outputs) write_outputs(in + left_, u, z);
  }
  // to [B, D, N, 2] or null: what is carried out of sequence row / D. first: the state before all steps,
  // where backwards goes to.
  __device__ void finish(float* to, const float* first, std::int64_t row, int N) {
    if (lane_ % 4 != 3) return;  // has what comes after the last block
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = component(half);
      if (n >= N) continue;
      const State<kBack>& a = end_[half];
      Pair carried{0, 0};
      if constexpr (kCarried) carried = carried_[half].value;
      const Pair value = in_time(multiply_add(into(half), a.value, carried));
      if (to != nullptr) *reinterpret_cast<Pair*>(to + (row * N + n) * 2) = value;
      if constexpr (kBack) {
        if (first == nullptr) continue;
        const FeatureCoefficients& c = memory_.coefficients[warp_];
        const Pair h = conjugate(read(first, row, half, N)), back = conjugate(c.q[n]);
        OfFirst& sum = memory_.of_first[warp_][n];
        sum.eta = multiply_add(h, multiply(back, a.value), sum.eta);
        Pair slope = multiply(conjugate(c.eta[n]), {a.value.re + a.slope.re, a.value.im + a.slope.im});
        if constexpr (kCarried) slope = multiply_add(1, divide(carried_[half].slope, nonzero(back)), slope);
        sum.q = multiply_add(h, slope, sum.q);
      }
    }
  }
  // to: the feature's.
  __device__ void write_gradients(const CemaSums& to, int N) {
    float* const lags = memory_.kernel[warp_];  // which has been used, as all rows
    float* const scratch = reinterpret_cast<float*>(memory_.rows) + warp_ * Lags::kScratch;
    static_assert(kFeatures * Lags::kScratch * sizeof(float) <= sizeof(memory_.rows));
    const float sum = lags_.sum(lane_, scratch);
    lags[lane_] = sum;
    if (lane_ == 0) *to.omega = sum, lags[kBlock] = 0;
    __syncwarp();
    std::uint32_t words[4];
    lags_as_columns(lags, words);
    const FeatureCoefficients& c = memory_.coefficients[warp_];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = component(half);
      Powers powers, slopes;
      read_powers(tables_ + 1024 * half, powers);
      make_slopes(powers, first_steps_, slopes);
      cuda::write_gradients<kCarried>(sums_[half], {powers, slopes, words, lane_}, memory_.of_first[warp_][n],
                                      c.p[n], c.q[n], c.eta[n], lane_, n, N, to);
    }
  }

 private:
  __device__ int component(int half) const { return kHalf * half + lane_ / 4; }
  // For WithinBlock.
  __device__ void lags_as_columns(const float* lags, std::uint32_t (&words)[4]) const {
    const int matrix_column = lane_ / 4, from = 2 * (lane_ % 4) + matrix_column / 2 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      std::uint32_t high, low;
      split(lags[8 * i + from], lags[8 * i + from + 1], high, low);
      words[i] = matrix_column >= 4 ? 0 : matrix_column % 2 == 0 ? high : low;
    }
  }
  // From inputs to what is carried, and from there to outputs.
  __device__ Pair into(int half) const { return coefficient(half, !kBack); }
  __device__ Pair out_of(int half) const { return coefficient(half, kBack); }
  __device__ Pair coefficient(int half, bool first) const {
    const FeatureCoefficients& c = memory_.coefficients[warp_];
    const int n = component(half);
    return first ? Pair{c.p[n], 0} : conjugate(multiply(c.eta[n], c.q[n]));
  }
  // States forwards are the conjugated of what is carried here.
  __device__ static Pair in_time(Pair a) { return kBack ? a : conjugate(a); }
  __device__ Pair read(const float* states, std::int64_t row, int half, int N) const {
    const int n = component(half);
    const float* const from = states + (row * N + n) * 2;
    return states != nullptr && n < N ? in_time({from[0], from[1]}) : Pair{0, 0};
  }
  __device__ auto decays_of(int half) const {
    return reinterpret_cast<const Pair(*)[kComponents]>(&memory_.factors[warp_].decays[0][component(half)]);
  }
  // y += U K for 8 steps.
  __device__ static void add_lags(const Blocks& left, const std::uint32_t (&kernel)[4], int column,
                                  float (&y)[4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int upper = 2 * k + column - 3, lower = upper + 1;
      if (lower < 0) continue;
      multiply_add(y, left[k], upper < 0 ? 0 : kernel[upper], kernel[lower]);
    }
  }
  // The matrices of powers as right-hand ones, for 16 steps: [half][2 column + part].
  __device__ void read_out_powers(int pair, Powers& powers) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_matrices<true>(powers[half], tables_ + 1024 * half + 512 * pair);
  }
  // In the place of the inputs u, at the lane's row.
  __device__ void write_outputs(std::uint32_t row, const Blocks& u, const std::uint32_t (&z)[2][4]) {
    Blocks left;
    if constexpr (kBack) {
      read_blocks(row, left);  // again: others had the registers
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) left[k][j] = u[k][j % 2 * 2 + j / 2];
      }
    }
    const uint4 lags = memory_.tables[warp_].lags[lane_];
    const std::uint32_t kernel[4] = {lags.x, lags.y, lags.z, lags.w};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      Powers& powers = out_powers_[pair];
      if constexpr (kBack) read_out_powers(pair, powers);
      float y[2][4] = {};
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        add_lags(left, kernel, 2 * pair + column, y[column]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply_add(y[column], z[half], powers[half][2 * column], powers[half][2 * column + 1]);
      }
      const std::uint32_t words[4] = {pack(y[0][0], y[0][1]), pack(y[0][2], y[0][3]), pack(y[1][0], y[1][1]),
                                      pack(y[1][2], y[1][3])};
      store_matrices<false>(words, row + 32 * pair);
    }
  }

  Memory<kBack>& memory_;
  int warp_, lane_;
  std::uint32_t tables_;  // the lane's
  int left_, right_;      // the lane's rows, from columns on
  std::uint32_t first_steps_;
  Powers out_powers_[2], low_powers_[2];  // forwards there are registers for them
  State<kBack> end_[2], carried_[kCarried ? 2 : 1];
  Sums sums_[2];
  Lags lags_;
};

// Of features 16 blockIdx.x .., over sequences blockIdx.y, blockIdx.y + gridDim.y, ..
template <bool kBack, bool kCarried>
__global__ void __launch_bounds__(kThreads, 1)
    blocks(CemaShape s, CemaCoefficients c, const __grid_constant__ Arrays arrays, int tiles,
           const float* carry_in, float* carry_out, CemaSums to) {
  if constexpr (kForHopper) {
    extern __shared__ __align__(1024) uint4 shared[];
    auto& memory = *reinterpret_cast<Memory<kBack>*>(shared);
    const int first_feature = static_cast<int>(blockIdx.x) * kFeatures,
              thread = static_cast<int>(threadIdx.x);
    const int sequences = static_cast<int>(s.B), N = static_cast<int>(s.N);
    Walk<kBack> now{static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y), tiles};
    Mover<kBack> mover(memory, arrays, first_feature, sequences, now);
    if (thread == kWorkers) {
      for (Barrier& barrier : memory.arrived) barrier.start(1);
      for (Barrier& barrier : memory.filled) barrier.start(kMovers / 32);
      for (Barrier& barrier : memory.used) barrier.start(kFeatures);
      barriers_are_started();
    }
    __syncthreads();
    if (thread >= kWorkers) {
      give_registers<32>();
      if (thread == kWorkers) mover.begin();
      mover.run(now);
    } else {
      take_registers<112>();
      const int warp = thread / 32;
      const std::int64_t d = first_feature + warp;
      Worker<kBack, kCarried> worker(memory);
      // Tables are made while the kernel before ends, and again if that wrote other coefficients.
      bool early = true;
#pragma unroll 1
      while (memory.coefficients[warp].read(s, c, d, thread % 32) || early) {
        worker.make_tables();
        wait_for_end_of_previous();
        early = false;
      }
      for (int i = 0; now.sequence < sequences; ++i, now.next()) {
        const int place = i % kTiles<kBack>;
        const std::int64_t row = now.sequence * s.D + d;
        if (now.is_first()) worker.begin(carry_in, row, N);
        memory.filled[place].wait(i / kTiles<kBack>);
        worker.tile(memory.columns[place], arrays.has_outputs);
        __syncwarp();
        if (thread % 32 == 0) memory.used[place].arrive();
        if (now.is_last()) worker.finish(carry_out, c.h0, row, N);
      }
      if constexpr (kBack) {
        named_wait(kAllRead, kThreads);
        const std::int64_t of_row = blockIdx.y * to.apart;
        worker.write_gradients({to.q + of_row + 2 * d * N, to.eta + of_row + 2 * d * N, to.p + of_row + d * N,
                                to.omega + of_row + d, to.apart},
                               N);
      }
    }
  }
}

template <bool kBack, bool kCarried>
void launch(const CemaShape& s, const CemaCoefficients& c, const Arrays& arrays, const float* carry_in,
            float* carry_out, const CemaSums& to, cudaStream_t stream) {
  const auto kernel = blocks<kBack, kCarried>;
  allow_shared_memory(kernel, sizeof(Memory<kBack>));
  const dim3 grid(static_cast<unsigned>(s.D / kFeatures), static_cast<unsigned>(cema_block_groups(s)));
  launch_step({grid, kThreads, sizeof(Memory<kBack>), stream}, kernel, s, c, arrays,
              static_cast<int>(s.L / kCemaTile), carry_in, carry_out, to);
}

}  // namespace

bool has_cema_blocks() {
  return has_hopper_code();
}

// As many as end soonest on a large device, where a thread block has a multiprocessor for itself and prepares
// for as long as kPrepared tiles take.
std::int64_t cema_block_groups(const CemaShape& s) {
  constexpr std::int64_t kMultiprocessors = 132, kPrepared = 3;
  const std::int64_t tiles = ceil_div(s.L, kSteps);
  std::int64_t best = 1, least = 0;
  for (std::int64_t groups = 1; groups <= s.B; ++groups) {
    const std::int64_t waves = ceil_div(s.D / kFeatures * groups, kMultiprocessors);
    const std::int64_t time = waves * (kPrepared + ceil_div(s.B, groups) * tiles);
    if (groups == 1 || time < least) best = groups, least = time;
  }
  return best;
}

void cema_blocks(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x, Bfloat16* y, float* h_last,
                 cudaStream_t stream) {
  const Boxes in = make_boxes(s, x);
  const Arrays arrays{{in, in}, y != nullptr ? make_boxes(s, y) : in, y != nullptr};
  const auto run = c.h0 != nullptr ? launch<false, true> : launch<false, false>;
  run(s, c, arrays, c.h0, h_last, {}, stream);
}

void cema_blocks_backward(const CemaShape& s, const CemaCoefficients& c, const Bfloat16* x,
                          const Bfloat16* dy, const float* dh_last, Bfloat16* dx, float* dh0,
                          const CemaSums& sums, cudaStream_t stream) {
  const Arrays arrays{{make_boxes(s, dy), make_boxes(s, x)}, make_boxes(s, dx), true};
  const auto run = dh_last != nullptr ? launch<true, true> : launch<true, false>;
  run(s, c, arrays, dh_last, dh0, sums, stream);
}

}  // namespace megalodon::ops::cuda
