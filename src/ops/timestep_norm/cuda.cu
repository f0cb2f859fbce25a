#include "ops/timestep_norm/cuda.h"

#include "ops/cuda_device.h"

// Shapes: B batch, L steps, D features, G groups, K = D/G features of a group. Three kernels each way: one
// reads the features for what each step and each tile of steps add to the statistics (forward) or to their
// gradients (backward); one carries that over the tiles; one goes over the steps of its tile again, from what
// was carried there, and writes the result.
namespace megalodon::ops::cuda {
namespace {

constexpr int kSteps = kTimestepNormTile;
constexpr int kMostGroups = 64;  // of a block
constexpr int kThreads = 256;
constexpr int kChunks = 16;  // of the tiles, scanned side by side

// Where a block stands: sequence blockIdx.y, tile blockIdx.x, groups from blockIdx.z * kMostGroups on.
struct Place {
  std::int64_t b, first_step, first_group;
  int steps, groups;

  __device__ explicit Place(const TimestepNormShape& s)
      : b(blockIdx.y),
        first_step(std::int64_t{blockIdx.x} * kSteps),
        first_group(std::int64_t{blockIdx.z} * kMostGroups),
        steps(static_cast<int>(min(s.L - first_step, std::int64_t{kSteps}))),
        groups(static_cast<int>(min(s.G - first_group, std::int64_t{kMostGroups}))) {}
  __device__ std::int64_t row(const TimestepNormShape& s, int t) const { return b * s.L + first_step + t; }
};

__device__ bool is_padded(const std::uint8_t* mask, std::int64_t row) {
  return mask != nullptr && mask[row] != 0;
}

// Counted steps of sequence b among `begin` .. `end` - 1, for all threads of the block.
__device__ std::int64_t counted(const std::uint8_t* mask, const TimestepNormShape& s, std::int64_t b,
                                std::int64_t begin, std::int64_t end) {
  if (mask == nullptr) return end - begin;
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (std::int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) mine += mask[b * s.L + t] == 0;
  atomicAdd(&total, mine);
  __syncthreads();
  return static_cast<std::int64_t>(total);
}

// The weight 1/n of each step of the tile in the statistics, n steps counted with it and `before` before the
// tile; 0 where padded. For all threads of the block.
__device__ void find_weights(const std::uint8_t* mask, const TimestepNormShape& s, const Place& at,
                             double before, double (&weights)[kSteps]) {
  if (threadIdx.x < kSteps) {
    const int t = static_cast<int>(threadIdx.x);
    const bool counts = t < at.steps && !is_padded(mask, at.row(s, t));
    const unsigned counting = __ballot_sync(~0u, counts);
    weights[t] = counts ? 1 / (before + __popc(counting & (~0u >> (31 - t)))) : 0;
  }
  __syncthreads();
}

// A number of every step and group of the tile, from [B, L, kinds, G]; 0 where padded.
__device__ void read_steps(const float* from, int kinds, int kind, const std::uint8_t* mask,
                           const TimestepNormShape& s, const Place& at, float (&to)[kSteps][kMostGroups]) {
  for (int i = static_cast<int>(threadIdx.x); i < at.steps * at.groups; i += static_cast<int>(blockDim.x)) {
    const int t = i / at.groups, g = i % at.groups;
    const std::int64_t row = at.row(s, t);
    to[t][g] = is_padded(mask, row) ? 0 : from[(row * kinds + kind) * s.G + at.first_group + g];
  }
}

// Sum over the `width` neighbouring lanes (a power of two) that share a group.
__device__ float group_sum(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Lanes that share a group: a power of two, at most a warp.
int lanes_of(std::int64_t packs) {
  int lanes = 1;
  while (lanes < packs && lanes < 32) lanes *= 2;
  return lanes;
}

// The cumulative statistics of a group.
struct Statistics {
  double count, mean, var;

  __device__ void add_step(double w, double step_mean, double step_var) {
    const double distance = step_mean - mean;
    var = (1 - w) * var + w * (step_var + (1 - w) * distance * distance);
    mean += w * distance;
  }
  __device__ void add(const Statistics& o) {
    if (o.count == 0) return;
    const double w = o.count / (count + o.count), distance = o.mean - mean;
    var = (1 - w) * var + w * (o.var + (1 - w) * distance * distance);
    mean += w * distance;
    count += o.count;
  }
};

// Arrays [B, tiles, 4, G] of the tiles' numbers.
struct TileArray {
  double* data;
  std::int64_t tiles, G;

  __device__ double& operator()(std::int64_t b, std::int64_t tile, int what, std::int64_t g) const {
    return data[((b * tiles + tile) * 4 + what) * G + g];
  }
  __device__ Statistics statistics(std::int64_t b, std::int64_t tile, std::int64_t g) const {
    const auto& self = *this;
    return {self(b, tile, 0, g), self(b, tile, 1, g), self(b, tile, 2, g)};
  }
  __device__ void set(std::int64_t b, std::int64_t tile, std::int64_t g, const Statistics& s) const {
    const auto& self = *this;
    self(b, tile, 0, g) = s.count, self(b, tile, 1, g) = s.mean, self(b, tile, 2, g) = s.var;
  }
};

// Mean and variance of every step and group, [B, L, 2, G], and the statistics of the tile.
template <class T, int V>
__global__ void forward_moments(TimestepNormShape s, TimestepNormForward<T> a, TimestepNormWork work,
                                int lanes) {
  const Place at(s);
  const std::int64_t K = s.D / s.G;
  __shared__ float means[kSteps][kMostGroups], variances[kSteps][kMostGroups];
  const int lane = static_cast<int>(threadIdx.x) % lanes, team = static_cast<int>(threadIdx.x) / lanes;
  const float scale = 1 / static_cast<float>(K);
  // Whole warps go round together: those past the end take the last item again.
  const int items = at.steps * at.groups, teams = kThreads / lanes;
  for (int first = 0; first < items; first += teams) {
    const int item = min(first + team, items - 1), t = item / at.groups, g = item % at.groups;
    const T* const x = a.x + at.row(s, t) * s.D + (at.first_group + g) * K;
    const float shift = to_float(x[0]);
    float v[V], sum = 0, squares = 0;
    for (std::int64_t i = lane * V; i < K; i += lanes * V) {
      load(x + i, v);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += v[j] - shift;
    }
    const float distance = group_sum(sum, lanes) * scale;
    for (std::int64_t i = lane * V; i < K; i += lanes * V) {
      load(x + i, v);
#pragma unroll
      for (int j = 0; j < V; ++j) squares += (v[j] - shift - distance) * (v[j] - shift - distance);
    }
    squares = group_sum(squares, lanes);
    const std::int64_t row = at.row(s, t);
    if (lane != 0) continue;
    const bool padded = is_padded(a.mask, row);
    means[t][g] = padded ? 0 : shift + distance, variances[t][g] = padded ? 0 : squares * scale;
  }
  __shared__ double weights[kSteps];
  find_weights(a.mask, s, at, 0, weights);
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kThreads) {
    const int t = i / at.groups, g = i % at.groups;
    float* const to = work.step + at.row(s, t) * 2 * s.G + at.first_group + g;
    to[0] = means[t][g], to[s.G] = variances[t][g];
  }
  for (int g = static_cast<int>(threadIdx.x); g < at.groups; g += kThreads) {
    Statistics sum{0, 0, 0};
    for (int t = 0; t < at.steps; ++t) {
      sum.add_step(weights[t], means[t][g], variances[t][g]);
      sum.count += weights[t] > 0 ? 1 : 0;
    }
    TileArray{work.tile, work.tiles, s.G}.set(at.b, blockIdx.x, at.first_group + g, sum);
  }
}

// The tiles' statistics become those before each tile. A block has 32 groups, one a lane; kChunks chunks of
// the tiles.
template <class T>
__global__ void forward_carry(TimestepNormShape s, TimestepNormForward<T> a, TimestepNormWork work) {
  const std::int64_t b = blockIdx.y, g = std::int64_t{blockIdx.x} * 32 + threadIdx.x, chunk = threadIdx.y;
  const std::int64_t length = (work.tiles + kChunks - 1) / kChunks;
  const std::int64_t begin = min(chunk * length, work.tiles), end = min(begin + length, work.tiles);
  const TileArray tile{work.tile, work.tiles, s.G};
  __shared__ Statistics chunks[kChunks][32];
  Statistics sum{0, 0, 0};
  if (g < s.G) {
    for (std::int64_t i = begin; i < end; ++i) sum.add(tile.statistics(b, i, g));
  }
  chunks[chunk][threadIdx.x] = sum;
  __syncthreads();
  if (g >= s.G) return;
  Statistics carried{static_cast<double>(a.count[b]), a.mean[b * s.G + g], a.var[b * s.G + g]};
  for (int i = 0; i < chunk; ++i) carried.add(chunks[i][threadIdx.x]);
  for (std::int64_t i = begin; i < end; ++i) {
    const Statistics own = tile.statistics(b, i, g);
    tile.set(b, i, g, carried);
    carried.add(own);
  }
  if (chunk != kChunks - 1) return;
  a.last_mean[b * s.G + g] = static_cast<float>(carried.mean);
  a.last_var[b * s.G + g] = static_cast<float>(carried.var);
}

template <class T, int V>
__global__ void forward_normalise(TimestepNormShape s, TimestepNormForward<T> a, TimestepNormWork work) {
  const Place at(s);
  const std::int64_t K = s.D / s.G;
  __shared__ float means[kSteps][kMostGroups], means_low[kSteps][kMostGroups], rstds[kSteps][kMostGroups];
  __shared__ double weights[kSteps];
  const TileArray tile{work.tile, work.tiles, s.G};
  read_steps(work.step, 2, 0, a.mask, s, at, means);
  read_steps(work.step, 2, 1, a.mask, s, at, rstds);
  find_weights(a.mask, s, at, tile(at.b, blockIdx.x, 0, at.first_group), weights);
  for (int g = static_cast<int>(threadIdx.x); g < at.groups; g += static_cast<int>(blockDim.x)) {
    Statistics now = tile.statistics(at.b, blockIdx.x, at.first_group + g);
    for (int t = 0; t < at.steps; ++t) {
      now.add_step(weights[t], means[t][g], rstds[t][g]);
      means[t][g] = static_cast<float>(now.mean);
      means_low[t][g] = static_cast<float>(now.mean - means[t][g]);
      rstds[t][g] = 1 / sqrtf(static_cast<float>(now.var) + a.eps);
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); a.step_mean != nullptr && i < at.steps * at.groups;
       i += static_cast<int>(blockDim.x)) {
    const int t = i / at.groups, g = i % at.groups;
    const std::int64_t to = at.row(s, t) * s.G + at.first_group + g;
    a.step_mean[to] = means[t][g], a.step_rstd[to] = rstds[t][g];
  }
  const std::int64_t first = at.first_group * K, width = at.groups * K;
  for (std::int64_t i = threadIdx.x * V; i < width; i += blockDim.x * V) {
    const int g = static_cast<int>(i / K);
    float weight[V], bias[V];
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] = 1 + a.weight[first + i + j], bias[j] = a.bias[first + i + j];
#pragma unroll 4
    for (int t = 0; t < at.steps; ++t) {
      const std::int64_t row = at.row(s, t);
      float v[V];
      load(a.x + row * s.D + first + i, v);
      const bool padded = weights[t] == 0;
#pragma unroll
      for (int j = 0; j < V; ++j)
        v[j] = padded ? 0 : (v[j] - means[t][g] - means_low[t][g]) * rstds[t][g] * weight[j] + bias[j];
      store(v, a.y + row * s.D + first + i);
    }
  }
}

// What a run of steps, taken backwards, makes of the gradients of the statistics after it:
//   d_var -> decay d_var + var,   d_mean -> decay d_mean + pull d_var + mean.
struct Adjoint {
  double decay, pull, var, mean;

  // One more step before: w its weight, `distance` its mean less the cumulative one after it, and what it
  // adds.
  __device__ void add_step(double w, double distance, double step_mean, double step_var) {
    const double kept = 1 - w, force = w < 1 ? 2 * w * distance : 0;
    var += step_var;
    mean = kept * (mean + step_mean) - force * var;
    pull = kept * pull - force * decay;
    var *= kept;
    decay *= kept;
  }
  // A run before this one.
  __device__ void add(const Adjoint& before) {
    mean = before.decay * mean + before.pull * var + before.mean;
    pull = before.decay * pull + before.pull * decay;
    var = before.decay * var + before.var;
    decay *= before.decay;
  }
};

// Sums over the features of every step and group of u = x - mean, h = dy (1 + weight) and h u, [B, L, 3, G],
// and the tile's Adjoint.
template <class T, int V>
__global__ void backward_sums(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormWork work,
                              int lanes) {
  const Place at(s);
  const std::int64_t K = s.D / s.G;
  __shared__ float sums[3][kSteps][kMostGroups];
  const int lane = static_cast<int>(threadIdx.x) % lanes, team = static_cast<int>(threadIdx.x) / lanes;
  const int items = at.steps * at.groups, teams = kThreads / lanes;
  for (int first = 0; first < items; first += teams) {
    const int item = min(first + team, items - 1), t = item / at.groups, g = item % at.groups;
    const std::int64_t row = at.row(s, t), group = at.first_group + g, column = group * K;
    const float mean = a.step_mean[row * s.G + group];
    float sum_u = 0, sum_h = 0, sum_hu = 0;
    for (std::int64_t i = column + lane * V; i < column + K; i += lanes * V) {
      float x[V], dy[V];
      load(a.x + row * s.D + i, x);
      load(a.dy + row * s.D + i, dy);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float u = x[j] - mean, h = dy[j] * (1 + a.weight[i + j]);
        sum_u += u, sum_h += h, sum_hu += h * u;
      }
    }
    sum_u = group_sum(sum_u, lanes), sum_h = group_sum(sum_h, lanes), sum_hu = group_sum(sum_hu, lanes);
    if (lane != 0) continue;
    const bool padded = is_padded(a.mask, row);
    sums[0][t][g] = padded ? 0 : sum_u, sums[1][t][g] = padded ? 0 : sum_h,
    sums[2][t][g] = padded ? 0 : sum_hu;
    for (int i = 0; i < 3; ++i) work.step[(row * 3 + i) * s.G + group] = sums[i][t][g];
  }
  __syncthreads();
  __shared__ double weights[kSteps];
  __shared__ float rstds[kSteps][kMostGroups];
  read_steps(a.step_rstd, 1, 0, a.mask, s, at, rstds);
  find_weights(a.mask, s, at, a.last_count[at.b] - counted(a.mask, s, at.b, at.first_step, s.L), weights);
  const double scale = 1 / static_cast<double>(K);
  for (int g = static_cast<int>(threadIdx.x); g < at.groups; g += kThreads) {
    const std::int64_t group = at.first_group + g;
    Adjoint run{1, 0, 0, 0};
    for (int t = at.steps - 1; t >= 0; --t) {
      const double r = rstds[t][g];
      run.add_step(weights[t], sums[0][t][g] * scale, -r * sums[1][t][g], -0.5 * r * r * r * sums[2][t][g]);
    }
    const TileArray tile{work.tile, work.tiles, s.G};
    tile(at.b, blockIdx.x, 0, group) = run.decay, tile(at.b, blockIdx.x, 1, group) = run.pull;
    tile(at.b, blockIdx.x, 2, group) = run.var, tile(at.b, blockIdx.x, 3, group) = run.mean;
  }
}

// The tiles' Adjoints become the gradients of mean and var (places 0 and 1) after each tile.
template <class T>
__global__ void backward_carry(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormWork work) {
  const std::int64_t b = blockIdx.y, g = std::int64_t{blockIdx.x} * 32 + threadIdx.x, chunk = threadIdx.y;
  const std::int64_t length = (work.tiles + kChunks - 1) / kChunks;
  const std::int64_t begin = min(chunk * length, work.tiles), end = min(begin + length, work.tiles);
  const TileArray tile{work.tile, work.tiles, s.G};
  const auto adjoint = [&](std::int64_t i) -> Adjoint {
    return {tile(b, i, 0, g), tile(b, i, 1, g), tile(b, i, 2, g), tile(b, i, 3, g)};
  };
  __shared__ Adjoint chunks[kChunks][32];
  Adjoint run{1, 0, 0, 0};
  if (g < s.G) {
    for (std::int64_t i = end - 1; i >= begin; --i) run.add(adjoint(i));
  }
  chunks[chunk][threadIdx.x] = run;
  __syncthreads();
  if (g >= s.G) return;
  Adjoint carried{0, 0, a.d_last_var[b * s.G + g], a.d_last_mean[b * s.G + g]};
  for (int i = kChunks - 1; i > chunk; --i) carried.add(chunks[i][threadIdx.x]);
  for (std::int64_t i = end - 1; i >= begin; --i) {
    const Adjoint own = adjoint(i);
    tile(b, i, 0, g) = carried.mean, tile(b, i, 1, g) = carried.var;
    carried.add(own);
  }
  if (chunk != 0) return;
  a.d_mean[b * s.G + g] = static_cast<float>(carried.mean);
  a.d_var[b * s.G + g] = static_cast<float>(carried.var);
}

// dx = h rstd + slope u + offset.
template <class T, int V>
__global__ void backward_input(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormWork work,
                               float* sums) {
  const Place at(s);
  const std::int64_t K = s.D / s.G;
  __shared__ float slopes[kSteps][kMostGroups], offsets[kSteps][kMostGroups], sums_hu[kSteps][kMostGroups];
  __shared__ float means[kSteps][kMostGroups], rstds[kSteps][kMostGroups];
  __shared__ double weights[kSteps];
  read_steps(work.step, 3, 0, a.mask, s, at, slopes);   // sums of u until they are slopes
  read_steps(work.step, 3, 1, a.mask, s, at, offsets);  // of h
  read_steps(work.step, 3, 2, a.mask, s, at, sums_hu);
  read_steps(a.step_mean, 1, 0, a.mask, s, at, means);
  read_steps(a.step_rstd, 1, 0, a.mask, s, at, rstds);
  find_weights(a.mask, s, at, a.last_count[at.b] - counted(a.mask, s, at.b, at.first_step, s.L), weights);
  const double scale = 1 / static_cast<double>(K);
  for (int g = static_cast<int>(threadIdx.x); g < at.groups; g += static_cast<int>(blockDim.x)) {
    const TileArray tile{work.tile, work.tiles, s.G};
    const std::int64_t group = at.first_group + g;
    double mean = tile(at.b, blockIdx.x, 0, group), var = tile(at.b, blockIdx.x, 1, group);
    for (int t = at.steps - 1; t >= 0; --t) {
      const double r = rstds[t][g], w = weights[t], distance = slopes[t][g] * scale;
      mean -= r * offsets[t][g];
      var -= 0.5 * r * r * r * sums_hu[t][g];
      const double pull = w < 1 ? 2 * w * var * distance : 0, slope = 2 * w * var * scale;
      slopes[t][g] = static_cast<float>(slope);
      offsets[t][g] = static_cast<float>((w * mean + pull) * scale - slope * distance);
      mean = (1 - w) * mean - pull;
      var *= 1 - w;
    }
  }
  __syncthreads();
  const std::int64_t first = at.first_group * K, width = at.groups * K;
  for (std::int64_t i = threadIdx.x * V; i < width; i += blockDim.x * V) {
    const int g = static_cast<int>(i / K);
    float weight[V], d_weight[V] = {}, d_bias[V] = {};
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] = 1 + a.weight[first + i + j];
#pragma unroll 4
    for (int t = 0; t < at.steps; ++t) {
      const std::int64_t here = at.row(s, t) * s.D + first + i;
      const bool padded = weights[t] == 0;
      float x[V], dy[V];
      load(a.x + here, x);
      load(a.dy + here, dy);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float u = padded ? 0 : x[j] - means[t][g], d = padded ? 0 : dy[j];
        d_weight[j] += d * (u * rstds[t][g]), d_bias[j] += d;
        x[j] = d * weight[j] * rstds[t][g] + (slopes[t][g] * u + offsets[t][g]);
        if (padded) x[j] = 0;
      }
      store(x, a.dx + here);
    }
    float* const to = sums + (at.b * work.tiles + blockIdx.x) * 2 * s.D + first + i;
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = d_weight[j], to[s.D + j] = d_bias[j];
  }
}

dim3 tile_grid(const TimestepNormShape& s, const TimestepNormWork& work) {
  return {grid_size(work.tiles), static_cast<unsigned>(s.B),
          static_cast<unsigned>(ceil_div(s.G, kMostGroups))};
}
dim3 carry_grid(const TimestepNormShape& s) {
  return {static_cast<unsigned>(ceil_div(s.G, 32)), static_cast<unsigned>(s.B)};
}
// Threads that each take columns of a block.
template <int V>
unsigned column_threads(const TimestepNormShape& s) {
  const std::int64_t groups = s.G < kMostGroups ? s.G : kMostGroups;
  return threads_for(ceil_div(groups * (s.D / s.G), V));
}

}  // namespace

template <class T>
void timestep_norm_forward(const TimestepNormShape& s, const TimestepNormForward<T>& a,
                           const TimestepNormWork& work, cudaStream_t stream) {
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const dim3 grid = tile_grid(s, work);
        forward_moments<T, V><<<grid, kThreads, 0, stream>>>(s, a, work, lanes_of(ceil_div(s.D / s.G, V)));
        forward_carry<T><<<carry_grid(s), dim3(32, kChunks), 0, stream>>>(s, a, work);
        forward_normalise<T, V><<<grid, column_threads<V>(s), 0, stream>>>(s, a, work);
      },
      a.x, a.y);
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& s, const TimestepNormBackward<T>& a,
                            const TimestepNormWork& work, float* sums, cudaStream_t stream) {
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const dim3 grid = tile_grid(s, work);
        backward_sums<T, V><<<grid, kThreads, 0, stream>>>(s, a, work, lanes_of(ceil_div(s.D / s.G, V)));
        backward_carry<T><<<carry_grid(s), dim3(32, kChunks), 0, stream>>>(s, a, work);
        backward_input<T, V><<<grid, column_threads<V>(s), 0, stream>>>(s, a, work, sums);
      },
      a.x, a.dy, a.dx);
}

template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<float>&,
                                    const TimestepNormWork&, cudaStream_t);
template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<Bfloat16>&,
                                    const TimestepNormWork&, cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<float>&,
                                     const TimestepNormWork&, float*, cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<Bfloat16>&,
                                     const TimestepNormWork&, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
