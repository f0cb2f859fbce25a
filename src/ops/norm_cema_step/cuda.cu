#include <cuda_pipeline.h>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"
#include "ops/norm_cema_step/cuda.h"
#include "ops/norm_cema_step/cuda_components.h"

// A block takes a group of features of some streams: a team of threads the norm of a stream, then all of them
// the moving average. `lanes` neighbouring threads share a feature: each has four components of it. The
// states, most of what is read, come into shared memory while the kernel before ends, if they may.
namespace megalodon::ops::cuda {
namespace {

constexpr int kMostThreads = kMostGroupComponents / 4 * 2;  // lanes are a power of two
static_assert(kMostThreads >= kMostNormStepFeatures);
constexpr int kMostStreams = 4;  // of a block
constexpr int kOfThread = 8;     // numbers of a thread's components of a stream's state

// The norm of a group of stream b, before weight and bias, by neighbouring threads of a warp: `team` of them,
// a power of two. A team that is not `there` only takes part in what its warp does together.
template <class T>
class GroupNorm {
 public:
  __device__ GroupNorm(const NormCemaStep<T>& a, std::int64_t b, std::int64_t group, int K, int team,
                       bool there)
      : a_(a), statistic_(b * a.G + group), K_(K), team_(team), there_(there) {
    mean_ = a.mean[statistic_], var_ = a.var[statistic_];
    const std::int64_t count = a.count[b];
    x_ = a.x + b * a.D + group * K_;
    next_count_ = there && lane() == 0 && group == 0 ? a.next_count + b : nullptr;
    of_feature_ = 1 / static_cast<float>(K_), of_step_ = 1 / (static_cast<double>(count) + 1);
    count_ = count;
    asm volatile("" : "+f"(of_feature_), "+d"(of_step_));  // no later than here
  }
  __device__ void run(float* normals) const {
    constexpr int kAtOnce = 4;
    const int end = there_ ? K_ : 0;
    float sum = 0, squares = 0;
#pragma unroll 1
    for (int first = lane(); first < end; first += kAtOnce * team_) {
      float v[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) v[j] = first + j * team_ < end ? to_float(x_[first + j * team_]) : 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j * team_ < end) normals[first + j * team_] = v[j];
        sum += v[j];
      }
    }
    const float now = sum_of_team(sum) * of_feature_;
#pragma unroll 1
    for (int i = lane(); i < end; i += team_) squares += (normals[i] - now) * (normals[i] - now);
    squares = sum_of_team(squares) * of_feature_;
    const double w = of_step_, distance = now - mean_;
    const double mean = mean_ + w * distance;
    const double var = (1 - w) * var_ + w * (squares + (1 - w) * distance * distance);
    if (there_ && lane() == 0) {
      a_.next_mean[statistic_] = static_cast<float>(mean);
      a_.next_var[statistic_] = static_cast<float>(var);
    }
    if (next_count_ != nullptr) *next_count_ = count_ + 1;
    const float deviation = rsqrtf(static_cast<float>(var) + a_.eps);
#pragma unroll 1
    for (int i = lane(); i < end; i += team_) normals[i] = static_cast<float>(normals[i] - mean) * deviation;
  }

 private:
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (team_ - 1); }
  __device__ float sum_of_team(float x) const {
    for (int offset = team_ / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
  }

  const NormCemaStep<T>& a_;
  const std::int64_t statistic_;
  const int K_, team_;
  const bool there_;
  const T* x_;
  std::int64_t* next_count_;
  std::int64_t count_;
  double mean_, var_, of_step_;  // of_step_: the new step's part of all so far
  float of_feature_;
};

template <class T, int kStreams>
__global__ void __launch_bounds__(kMostThreads) step(const NormCemaStep<T> a, int K, int lanes, int team) {
  let_next_start();
  extern __shared__ __align__(16) float shared[];
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t group = blockIdx.x, first = std::int64_t{blockIdx.y} * kStreams;
  const int lane = t & (lanes - 1), feature = t / lanes;
  const bool is_feature = feature < K, is_first = is_feature && lane == 0,
             has_components = is_feature && 4 * lane < a.N;
  const std::int64_t d = group * K + (is_feature ? feature : 0);
  const std::int64_t component = d * a.N + (has_components ? 4 * lane : 0);
  const int here = static_cast<int>(min(a.B - first, std::int64_t{kStreams}));
  const auto h_of = [&](int s) { return a.h + 2 * ((first + s) * a.D * a.N + component); };
  const auto kept_h_of = [&](int s) { return shared + (s * blockDim.x + threadIdx.x) * kOfThread; };
  float* const normals = shared + (a.N > 0 ? kStreams * blockDim.x * kOfThread : 0);  // [kStreams, K]

  // All that is read is asked for before any of it is used.
  if (!a.early) wait_for_previous();
  if (has_components) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      if (s >= here) break;
#pragma unroll
      for (int i = 0; i < kOfThread; i += 4)
        __pipeline_memcpy_async(kept_h_of(s) + i, h_of(s) + i, 4 * sizeof(float));
    }
  }
  __pipeline_commit();
  float p[4] = {};
  if (has_components) load(a.p + component, p);
  const Complex4 q = load_complex(a.q + 2 * component, has_components);
  const Complex4 eta = load_complex(a.eta + 2 * component, has_components);
  const float weight = 1 + a.weight[d], bias = a.bias[d], omega = a.N > 0 ? a.omega[d] : 0;
  const int stream = min(t / team, here - 1);
  const GroupNorm<T> norm(a, first + stream, group, K, team, stream == t / team);
  if (a.early) wait_for_previous();

  if (t / 32 * 32 < team * here) norm.run(normals + stream * K);
  __pipeline_wait_prior(0);
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    if (s >= here) break;
    const T normal = from_float<T>(is_feature ? normals[s * K + feature] * weight + bias : 0);
    const float input = to_float(normal);
    if (is_first) a.normal[(first + s) * a.D + d] = normal;
    if (a.N == 0) continue;
    Complex4 h = load_complex(kept_h_of(s), has_components);
    float y = advance(h, q, p, eta, input);
    if (has_components) store_complex(h, h_of(s));
    for (int offset = lanes / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(~0u, y, offset);
    if (is_first) a.y[(first + s) * a.D + d] = from_float<T>(y + omega * input);
  }
}

template <class T, int kStreams>
void launch(const NormCemaStep<T>& a, cudaStream_t stream) {
  const int K = static_cast<int>(a.D / a.G), lanes = lanes_of(a.N);
  const auto threads = static_cast<unsigned>(ceil_div(K * lanes, 32) * 32);
  int team = 32;
  while (team * kStreams > static_cast<int>(threads)) team /= 2;
  const auto shared = kStreams * sizeof(float) *
                      (static_cast<std::size_t>(K) + (a.N > 0 ? threads * std::size_t{kOfThread} : 0));
  // All of a multiprocessor's, as products have it: one cannot be divided in two ways at a time.
  allow_all_shared_memory(step<T, kStreams>, shared);
  // All blocks run at once, beside the last blocks of a product: one that waited for room would double the
  // time.
  if constexpr (kStreams < kMostStreams) {
    const std::int64_t places = resident_blocks(step<T, kStreams>, threads, shared) * 3 / 4;
    if (a.G * ceil_div(a.B, kStreams) > places) return launch<T, 2 * kStreams>(a, stream);
  }
  const dim3 grid(static_cast<unsigned>(a.G), grid_size(ceil_div(a.B, kStreams)));
  launch_step({grid, threads, shared, stream}, step<T, kStreams>, a, K, lanes, team);
}

}  // namespace

template <class T>
void norm_cema_step(const NormCemaStep<T>& a, cudaStream_t stream) {
  if (a.B > 0) launch<T, 1>(a, stream);
}

template void norm_cema_step(const NormCemaStep<float>&, cudaStream_t);
template void norm_cema_step(const NormCemaStep<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
