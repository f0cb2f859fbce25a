#include <algorithm>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"
#include "ops/norm_cema_step/cuda.h"
#include "ops/norm_cema_step/cuda_components.h"

// A block takes a group of features of some streams. `lanes` neighbouring threads share a feature: each has
// four components of it, in registers for all streams.
namespace megalodon::ops::cuda {
namespace {

constexpr int kMostThreads = kMostGroupComponents / 4 * 2;  // lanes are a power of two
static_assert(kMostThreads >= kMostNormStepFeatures);

template <class T>
__global__ void __launch_bounds__(kMostThreads) step(NormCemaStep<T> a, int lanes) {
  const std::int64_t K = a.D / a.G, group = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % lanes, feature = static_cast<int>(threadIdx.x) / lanes;
  const bool is_feature = feature < K, is_first = is_feature && lane == 0,
             has_components = is_feature && 4 * lane < a.N;
  const std::int64_t d = group * K + (is_feature ? feature : 0);
  const std::int64_t component = d * a.N + (has_components ? 4 * lane : 0);
  prefetch(a.weight + d), prefetch(a.bias + d);
  if (has_components) {
    prefetch(a.p + component), prefetch(a.q + 2 * component), prefetch(a.eta + 2 * component);
    prefetch(a.h + 2 * (blockIdx.y * a.D * a.N + component)), prefetch(a.omega + d);
  }
  wait_for_previous();

  float p[4] = {};
  if (has_components) load(a.p + component, p);
  const Complex4 q = load_complex(a.q + 2 * component, has_components);
  const Complex4 eta = load_complex(a.eta + 2 * component, has_components);
  const float weight = 1 + a.weight[d], bias = a.bias[d], omega = a.N > 0 ? a.omega[d] : 0;
  struct Stream {
    float x, mean, var;
    std::int64_t count;
    Complex4 h;
  };
  const auto h_of = [&](std::int64_t b) { return a.h + 2 * (b * a.D * a.N + component); };
  const auto read = [&](std::int64_t b) {
    return Stream{to_float(a.x[b * a.D + d]), a.mean[b * a.G + group], a.var[b * a.G + group], a.count[b],
                  load_complex(h_of(b), has_components)};
  };
  Stream next = read(blockIdx.y);
  for (std::int64_t b = blockIdx.y; b < a.B; b += gridDim.y) {
    const float x = next.x;
    Complex4 h = next.h;
    const double before = next.mean, var_before = next.var;
    const std::int64_t count = next.count;
    if (b + gridDim.y < a.B) next = read(b + gridDim.y);

    float sum[1] = {is_first ? x : 0};
    block_sum(sum);
    const float of_step = sum[0] / static_cast<float>(K);
    sum[0] = is_first ? (x - of_step) * (x - of_step) : 0;
    block_sum(sum);
    const double w = 1 / (static_cast<double>(count) + 1), distance = of_step - before;
    const double mean = before + w * distance;
    const double var =
        (1 - w) * var_before + w * (sum[0] / static_cast<double>(K) + (1 - w) * distance * distance);
    if (threadIdx.x == 0) {
      a.next_mean[b * a.G + group] = static_cast<float>(mean);
      a.next_var[b * a.G + group] = static_cast<float>(var);
      if (group == 0) a.next_count[b] = count + 1;
    }
    const float deviation = 1 / sqrtf(static_cast<float>(var) + a.eps);
    const T normal = from_float<T>(static_cast<float>(x - mean) * deviation * weight + bias);
    const float input = to_float(normal);

    float y = advance(h, q, p, eta, input);
    if (has_components) store_complex(h, h_of(b));
    for (int offset = lanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
    if (is_first) a.normal[b * a.D + d] = normal;
    if (is_first && a.N > 0) a.y[b * a.D + d] = from_float<T>(y + omega * input);
  }
}

}  // namespace

template <class T>
void norm_cema_step(const NormCemaStep<T>& a, cudaStream_t stream) {
  const int lanes = lanes_of(a.N);
  const auto threads = static_cast<unsigned>(ceil_div(a.D / a.G * lanes, 32) * 32);
  // All blocks run at once: one that waited for room would double the time.
  const std::int64_t rows = std::max<std::int64_t>(resident_blocks(step<T>, threads, 0) / a.G, 1);
  const std::int64_t streams = ceil_div(a.B, rows);  // of a block
  const dim3 grid(static_cast<unsigned>(a.G), grid_size(ceil_div(a.B, streams)));
  launch_step({grid, threads, 0, stream}, step<T>, a, lanes);
}

template void norm_cema_step(const NormCemaStep<float>&, cudaStream_t);
template void norm_cema_step(const NormCemaStep<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
