#include <algorithm>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"
#include "ops/norm_cema_step/cuda.h"
#include "ops/norm_cema_step/cuda_components.h"

// A block takes a group of features of some streams: a warp the norm of a stream, then all threads the moving
// average. `lanes` neighbouring threads share a feature: each has four components of it.
namespace megalodon::ops::cuda {
namespace {

constexpr int kMostThreads = kMostGroupComponents / 4 * 2;  // lanes are a power of two
static_assert(kMostThreads >= kMostNormStepFeatures);
constexpr int kMostStreams = 4;  // of a block

// The norm of a group of stream b, by a warp, before weight and bias.
template <class T>
__device__ void normalise(const NormCemaStep<T>& a, int K, std::int64_t b, std::int64_t group,
                          float* normals) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t statistic = b * a.G + group;
  const T* const x = a.x + b * a.D + group * K;
  const double before = a.mean[statistic], var_before = a.var[statistic];
  const std::int64_t count = a.count[b];
  float sum = 0, squares = 0;
#pragma unroll 1
  for (int i = lane; i < K; i += 32) sum += to_float(x[i]);
  const float of_step = warp_sum(sum) / static_cast<float>(K);
#pragma unroll 1
  for (int i = lane; i < K; i += 32) squares += (to_float(x[i]) - of_step) * (to_float(x[i]) - of_step);
  squares = warp_sum(squares) / static_cast<float>(K);
  const double w = 1 / (static_cast<double>(count) + 1), distance = of_step - before;
  const double mean = before + w * distance;
  const double var = (1 - w) * var_before + w * (squares + (1 - w) * distance * distance);
  if (lane == 0) {
    a.next_mean[statistic] = static_cast<float>(mean);
    a.next_var[statistic] = static_cast<float>(var);
    if (group == 0) a.next_count[b] = count + 1;
  }
  const float deviation = 1 / sqrtf(static_cast<float>(var) + a.eps);
#pragma unroll 1
  for (int i = lane; i < K; i += 32) normals[i] = static_cast<float>(to_float(x[i]) - mean) * deviation;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) step(NormCemaStep<T> a, int lanes, int streams) {
  let_next_start();
  __shared__ float normals[kMostStreams][kMostNormStepFeatures];
  const std::int64_t K = a.D / a.G, group = blockIdx.x, first = std::int64_t{blockIdx.y} * streams;
  const int lane = static_cast<int>(threadIdx.x) % lanes, feature = static_cast<int>(threadIdx.x) / lanes;
  const bool is_feature = feature < K, is_first = is_feature && lane == 0,
             has_components = is_feature && 4 * lane < a.N;
  const std::int64_t d = group * K + (is_feature ? feature : 0);
  const std::int64_t component = d * a.N + (has_components ? 4 * lane : 0);
  const int here = static_cast<int>(min(a.B - first, std::int64_t{streams}));
  const auto h_of = [&](int s) { return a.h + 2 * ((first + s) * a.D * a.N + component); };
  prefetch(a.weight + d), prefetch(a.bias + d);
  if (has_components) {
    prefetch(a.p + component), prefetch(a.q + 2 * component), prefetch(a.eta + 2 * component);
    for (int s = 0; s < here; ++s) prefetch(h_of(s));
    prefetch(a.omega + d);
  }
  wait_for_previous();

  // All that is read is asked for before any of it is used.
  Complex4 h[kMostStreams];
#pragma unroll
  for (int s = 0; s < kMostStreams; ++s) h[s] = load_complex(h_of(s), has_components && s < here);
  float p[4] = {};
  if (has_components) load(a.p + component, p);
  const Complex4 q = load_complex(a.q + 2 * component, has_components);
  const Complex4 eta = load_complex(a.eta + 2 * component, has_components);
  const float weight = 1 + a.weight[d], bias = a.bias[d], omega = a.N > 0 ? a.omega[d] : 0;
#pragma unroll 1
  for (int s = static_cast<int>(threadIdx.x) / 32; s < here; s += static_cast<int>(blockDim.x) / 32)
    normalise(a, static_cast<int>(K), first + s, group, normals[s]);
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kMostStreams; ++s) {
    if (s >= here) break;
    const T normal = from_float<T>(is_feature ? normals[s][feature] * weight + bias : 0);
    const float input = to_float(normal);
    if (is_first) a.normal[(first + s) * a.D + d] = normal;
    if (a.N == 0) continue;
    float y = advance(h[s], q, p, eta, input);
    if (has_components) store_complex(h[s], h_of(s));
    for (int offset = lanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
    if (is_first) a.y[(first + s) * a.D + d] = from_float<T>(y + omega * input);
  }
}

}  // namespace

template <class T>
void norm_cema_step(const NormCemaStep<T>& a, cudaStream_t stream) {
  if (a.B == 0) return;
  const int lanes = lanes_of(a.N);
  const auto threads = static_cast<unsigned>(ceil_div(a.D / a.G * lanes, 32) * 32);
  // All blocks run at once, if they can: one that waited for room would double the time.
  const std::int64_t rows = std::max<std::int64_t>(resident_blocks(step<T>, threads, 0) / a.G, 1);
  const std::int64_t streams = std::min<std::int64_t>(ceil_div(a.B, rows), kMostStreams);
  const dim3 grid(static_cast<unsigned>(a.G), grid_size(ceil_div(a.B, streams)));
  launch_step({grid, threads, 0, stream}, step<T>, a, lanes, static_cast<int>(streams));
}

template void norm_cema_step(const NormCemaStep<float>&, cudaStream_t);
template void norm_cema_step(const NormCemaStep<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
