#include "ops/cema/cuda.h"

#include "ops/cuda_device.h"

// The recurrence in registers: a thread has kOwn components of a feature, and `lanes` neighbouring threads
// share the feature. h is the state and g its gradient:
//   h_t = q h_{t-1} + p x_t,                  y_t = Re(sum eta h_t) + omega x_t,
//   g_t = conj(q) g_{t+1} + conj(eta) dy_t,   dx_t = p Re(sum g_t) + omega dy_t,
//   dp = sum Re(g_t) x_t,   dq = sum g_t conj(h_{t-1}),   deta = sum dy_t conj(h_t).
// Between steps g is kept as conj(q) g_{t+1}, the gradient of h_t from what comes after it.
// Backwards, h is made again for a span of steps at a time, from the span's first state.
namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kOwn = 4;
constexpr int kRun = 8;  // steps whose states are in registers, or inputs in flight
constexpr int kRuns = kCemaSpan / kRun;

struct Complex {
  float re, im;
};
__device__ Complex multiply_add(Complex a, Complex b, Complex c) {
  return {a.re * b.re - a.im * b.im + c.re, a.re * b.im + a.im * b.re + c.im};
}
__device__ Complex conjugate(Complex a) {
  return {a.re, -a.im};
}

int lanes_of(const CemaShape& s) {
  int lanes = 1;
  while (lanes * kOwn < s.N) lanes *= 2;
  return lanes;
}

// The steps from `first` on, in segments of `length` whose threads share features by `lanes`.
struct Cut {
  std::int64_t first, length;
  int lanes;
};

// What a thread works on: components n .. n + kOwn - 1 of feature d, in segment blockIdx.y of sequence
// blockIdx.z.
struct Place {
  std::int64_t b, segment, d, begin, end;
  int n;
  bool inside;

  __device__ Place(const CemaShape& s, const Cut& cut) {
    const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    b = blockIdx.z, segment = blockIdx.y;
    inside = i / cut.lanes < s.D;
    d = inside ? i / cut.lanes
               : s.D - 1;  // whole warps go together: the rest repeat the last feature and write nothing
    n = static_cast<int>(i % cut.lanes) * kOwn;
    begin = cut.first + segment * cut.length;
    end = min(begin + cut.length, s.L);
  }
};

// Of a thread's components; those past N are zero.
struct Coefficients {
  float p[kOwn];
  Complex q[kOwn], eta[kOwn];
  float omega;

  __device__ Coefficients(const CemaShape& s, const CemaCoefficients& c, const Place& at)
      : omega(c.omega[at.d]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool there = at.n + i < s.N;
      const std::int64_t from = at.d * s.N + at.n + i;
      p[i] = there ? c.p[from] : 0;
      q[i] = there ? Complex{c.q[2 * from], c.q[2 * from + 1]} : Complex{0, 0};
      eta[i] = there ? Complex{c.eta[2 * from], c.eta[2 * from + 1]} : Complex{0, 0};
    }
  }
};

// A thread's part of row `row` of states [rows, D, N, 2]; zero where there is no array.
__device__ void read_state(const CemaShape& s, const float* states, std::int64_t row, const Place& at,
                           Complex (&h)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const std::int64_t from = ((row * s.D + at.d) * s.N + at.n + i) * 2;
    h[i] = states != nullptr && at.n + i < s.N ? Complex{states[from], states[from + 1]} : Complex{0, 0};
  }
}
__device__ void write_state(const CemaShape& s, float* states, std::int64_t row, const Place& at,
                            const Complex (&h)[kOwn]) {
  if (!at.inside || states == nullptr) return;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const std::int64_t to = ((row * s.D + at.d) * s.N + at.n + i) * 2;
    if (at.n + i < s.N) states[to] = h[i].re, states[to + 1] = h[i].im;
  }
}

__device__ void step_forward(const Coefficients& c, float x, Complex (&h)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) h[i] = multiply_add(c.q[i], h[i], {c.p[i] * x, 0});
}
__device__ void add_output_gradient(const Coefficients& c, float dy, Complex (&g)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) g[i].re += c.eta[i].re * dy, g[i].im -= c.eta[i].im * dy;
}
__device__ void decay_back(const Coefficients& c, Complex (&g)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) g[i] = multiply_add(conjugate(c.q[i]), g[i], {0, 0});
}

__device__ float feature_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// kRun elements of a feature from step t on; zero past `end`.
template <class T>
__device__ void load_run(const T* x, const CemaShape& s, const Place& at, std::int64_t t, std::int64_t end,
                         float (&to)[kRun]) {
#pragma unroll
  for (int j = 0; j < kRun; ++j) to[j] = t + j < end ? to_float(x[(at.b * s.L + t + j) * s.D + at.d]) : 0;
}

// What each segment makes of a zero state.
template <class T>
__global__ void forward_segments(CemaShape s, CemaCoefficients coefficients, const T* __restrict__ x, Cut cut,
                                 float* segment_state) {
  const Place at(s, cut);
  const Coefficients c(s, coefficients, at);
  Complex h[kOwn] = {};
  for (std::int64_t t = at.begin; t < at.end; t += kRun) {
    float x_t[kRun];
    load_run(x, s, at, t, at.end, x_t);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (t + j < at.end) step_forward(c, x_t[j], h);
    }
  }
  write_state(s, segment_state, at.b * gridDim.y + at.segment, at, h);
}

// The same backwards: the gradient of the state before each segment, from what its own outputs give.
template <class T>
__global__ void backward_segments(CemaShape s, CemaCoefficients coefficients, const T* __restrict__ dy,
                                  Cut cut, float* segment_state) {
  const Place at(s, cut);
  const Coefficients c(s, coefficients, at);
  Complex g[kOwn] = {};
  for (std::int64_t t = at.begin + (at.end - at.begin - 1) / kRun * kRun; t >= at.begin; t -= kRun) {
    float dy_t[kRun];
    load_run(dy, s, at, t, at.end, dy_t);
#pragma unroll
    for (int j = kRun - 1; j >= 0; --j) {
      if (t + j >= at.end) continue;
      add_output_gradient(c, dy_t[j], g);
      decay_back(c, g);
    }
  }
  write_state(s, segment_state, at.b * gridDim.y + at.segment, at, g);
}

__device__ double2 power(double2 q, std::int64_t exponent) {
  double2 result{1, 0};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = {result.x * q.x - result.y * q.y, result.x * q.y + result.y * q.x};
    q = {q.x * q.x - q.y * q.y, 2 * q.x * q.y};
  }
  return result;
}

// What segments make of zero becomes what each starts from; backwards from the last to the first, with
// conj(q). A thread has one component. `first` [B, D, N, 2], or null for zero.
__global__ void carry_segments(CemaShape s, const float* q, const float* first, std::int64_t segments,
                               Cut cut, bool backwards, float* segment_state) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, features = s.D * s.N;
  if (i >= s.B * features) return;
  const std::int64_t b = i / features, component = i % features;
  const double2 q_n{q[2 * component], backwards ? -q[2 * component + 1] : q[2 * component + 1]};
  double2 carried{0, 0};
  if (first != nullptr) carried = {first[2 * i], first[2 * i + 1]};
  for (std::int64_t k = 0; k < segments; ++k) {
    const std::int64_t segment = backwards ? segments - 1 - k : k;
    float* const state = segment_state + 2 * ((b * segments + segment) * features + component);
    const double2 own{state[0], state[1]};
    state[0] = static_cast<float>(carried.x), state[1] = static_cast<float>(carried.y);
    const double2 decay = power(q_n, min(cut.length, s.L - cut.first - segment * cut.length));
    carried = {decay.x * carried.x - decay.y * carried.y + own.x,
               decay.x * carried.y + decay.y * carried.x + own.y};
  }
}

// Outputs of each segment from its first state, or, without y, the states before its spans.
template <class T>
__global__ void forward_outputs(CemaShape s, CemaCoefficients coefficients, const T* __restrict__ x, Cut cut,
                                const float* segment_state, T* __restrict__ y, float* h_last,
                                float* span_state) {
  const Place at(s, cut);
  const Coefficients c(s, coefficients, at);
  Complex h[kOwn];
  read_state(s, segment_state, at.b * gridDim.y + at.segment, at, h);
  const std::int64_t spans = (s.L - cut.first + kCemaSpan - 1) / kCemaSpan;
  for (std::int64_t t = at.begin; t < at.end; t += kRun) {
    if ((t - cut.first) % kCemaSpan == 0)
      write_state(s, span_state, at.b * spans + (t - cut.first) / kCemaSpan, at, h);
    float x_t[kRun];
    load_run(x, s, at, t, at.end, x_t);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (t + j >= at.end) break;
      step_forward(c, x_t[j], h);
      if (y == nullptr) continue;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum += c.eta[i].re * h[i].re - c.eta[i].im * h[i].im;
      sum = feature_sum(sum, cut.lanes);
      if (at.n == 0 && at.inside)
        y[(at.b * s.L + t + j) * s.D + at.d] = from_float<T>(sum + c.omega * x_t[j]);
    }
  }
  if (at.end == s.L) write_state(s, h_last, at.b, at, h);
}

// Gradients of a thread's coefficients.
struct Sums {
  float p[kOwn] = {}, omega = 0;
  Complex q[kOwn] = {}, eta[kOwn] = {};
};

// kRun steps backwards, from the state before them.
template <class T>
__device__ void run_back(const CemaShape& s, const Coefficients& c, const Place& at, std::int64_t t,
                         int lanes, const T* __restrict__ x, const T* __restrict__ dy,
                         const Complex (&before)[kOwn], Complex (&g)[kOwn], Sums& sums, T* __restrict__ dx) {
  float x_t[kRun], dy_t[kRun];
  load_run(x, s, at, t, at.end, x_t);
  load_run(dy, s, at, t, at.end, dy_t);
  Complex h[kRun + 1][kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) h[0][i] = before[i];
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) h[j + 1][i] = multiply_add(c.q[i], h[j][i], {c.p[i] * x_t[j], 0});
  }
#pragma unroll
  for (int j = kRun - 1; j >= 0; --j) {
    if (t + j >= at.end) continue;
    add_output_gradient(c, dy_t[j], g);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      sum += c.p[i] * g[i].re;
      sums.p[i] += g[i].re * x_t[j];
      sums.q[i] = multiply_add(g[i], conjugate(h[j][i]), sums.q[i]);
      sums.eta[i].re += dy_t[j] * h[j + 1][i].re;
      sums.eta[i].im -= dy_t[j] * h[j + 1][i].im;
    }
    decay_back(c, g);
    sums.omega += dy_t[j] * x_t[j];
    sum = feature_sum(sum, lanes);
    if (at.n == 0 && at.inside)
      dx[(at.b * s.L + t + j) * s.D + at.d] = from_float<T>(sum + c.omega * dy_t[j]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_outputs(CemaShape s, CemaCoefficients coefficients, const T* __restrict__ x,
                     const T* __restrict__ dy, Cut cut, const float* segment_gradient,
                     const float* span_state, T* __restrict__ dx, float* dh0, CemaSums to) {
  __shared__ Complex saved[kRuns][kOwn][kThreads];
  const Place at(s, cut);
  const Coefficients c(s, coefficients, at);
  Complex g[kOwn];
  read_state(s, segment_gradient, at.b * gridDim.y + at.segment, at, g);
  Sums sums;
  const std::int64_t spans = (s.L - cut.first + kCemaSpan - 1) / kCemaSpan;
  for (std::int64_t span = (at.end - 1 - cut.first) / kCemaSpan; cut.first + span * kCemaSpan >= at.begin;
       --span) {
    const std::int64_t first = cut.first + span * kCemaSpan;
    Complex h[kOwn];
    read_state(s, span_state, at.b * spans + span, at, h);
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) saved[r][i][threadIdx.x] = h[i];
      float x_t[kRun];
      load_run(x, s, at, first + r * kRun, at.end, x_t);
#pragma unroll
      for (int j = 0; j < kRun; ++j) step_forward(c, x_t[j], h);
    }
    for (int r = kRuns - 1; r >= 0; --r) {
      const std::int64_t t = first + r * kRun;
      if (t >= at.end) continue;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) h[i] = saved[r][i][threadIdx.x];
      run_back(s, c, at, t, cut.lanes, x, dy, h, g, sums, dx);
    }
  }
  if (at.segment == 0) write_state(s, dh0, at.b, at, g);
  if (!at.inside) return;
  const std::int64_t row = (at.b * gridDim.y + at.segment) * to.apart;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (at.n + i >= s.N) break;
    const std::int64_t n = at.d * s.N + at.n + i;
    to.p[row + n] = sums.p[i];
    to.q[row + 2 * n] = sums.q[i].re, to.q[row + 2 * n + 1] = sums.q[i].im;
    to.eta[row + 2 * n] = sums.eta[i].re, to.eta[row + 2 * n + 1] = sums.eta[i].im;
  }
  if (at.n == 0) to.omega[row + at.d] = sums.omega;
}

struct Launch {
  dim3 grid;
  Cut cut;
  std::int64_t segments;
  unsigned carry_blocks;

  Launch(const CemaShape& s, std::int64_t first) {
    const CemaCut c = cema_cut(s, first);
    segments = c.segments;
    cut = {first, ceil_div(c.spans, c.segments) * kCemaSpan, lanes_of(s)};
    grid = dim3(grid_size(ceil_div(s.D * cut.lanes, kThreads)), static_cast<unsigned>(segments),
                static_cast<unsigned>(s.B));
    carry_blocks = grid_size(ceil_div(s.B * s.D * s.N, kThreads));
  }
};

// The states that the segments start from; those of the sequences where there is one segment.
template <class T>
const float* first_states(const Launch& l, const CemaShape& s, const CemaCoefficients& c, const T* x,
                          float* segment_state, cudaStream_t stream) {
  if (l.segments == 1) return c.h0;
  forward_segments<<<l.grid, kThreads, 0, stream>>>(s, c, x, l.cut, segment_state);
  carry_segments<<<l.carry_blocks, kThreads, 0, stream>>>(s, c.q, c.h0, l.segments, l.cut, false,
                                                          segment_state);
  return segment_state;
}
template <class T>
const float* last_gradients(const Launch& l, const CemaShape& s, const CemaCoefficients& c, const T* dy,
                            const float* dh_last, float* segment_state, cudaStream_t stream) {
  if (l.segments == 1) return dh_last;
  backward_segments<<<l.grid, kThreads, 0, stream>>>(s, c, dy, l.cut, segment_state);
  carry_segments<<<l.carry_blocks, kThreads, 0, stream>>>(s, c.q, dh_last, l.segments, l.cut, true,
                                                          segment_state);
  return segment_state;
}

}  // namespace

CemaCut cema_cut(const CemaShape& s, std::int64_t first) {
  constexpr std::int64_t kWanted = 132 * 512;  // threads
  const std::int64_t spans = ceil_div(s.L - first, kCemaSpan), threads = s.B * s.D * lanes_of(s);
  const std::int64_t segments = ceil_div(kWanted, threads);
  const std::int64_t length = ceil_div(spans, segments < spans ? segments : spans);
  return {ceil_div(spans, length), spans};
}

template <class T>
void cema_forward(const CemaShape& s, std::int64_t first, const CemaCoefficients& c, const T* x,
                  float* segment_state, T* y, float* h_last, cudaStream_t stream) {
  const Launch l(s, first);
  const float* const states = first_states(l, s, c, x, segment_state, stream);
  forward_outputs<<<l.grid, kThreads, 0, stream>>>(s, c, x, l.cut, states, y, h_last,
                                                   static_cast<float*>(nullptr));
}

template <class T>
void cema_backward(const CemaShape& s, std::int64_t first, const CemaCoefficients& c, const T* x, const T* dy,
                   const float* dh_last, const CemaBackwardWork& work, T* dx, float* dh0,
                   cudaStream_t stream) {
  const Launch l(s, first);
  const float* const states = first_states(l, s, c, x, work.segment_state, stream);
  forward_outputs<<<l.grid, kThreads, 0, stream>>>(s, c, x, l.cut, states, static_cast<T*>(nullptr),
                                                   static_cast<float*>(nullptr), work.span_state);
  const float* const after = last_gradients(l, s, c, dy, dh_last, work.segment_state, stream);
  backward_outputs<<<l.grid, kThreads, 0, stream>>>(s, c, x, dy, l.cut, after, work.span_state, dx, dh0,
                                                    work.sums);
}

template void cema_forward(const CemaShape&, std::int64_t, const CemaCoefficients&, const float*, float*,
                           float*, float*, cudaStream_t);
template void cema_forward(const CemaShape&, std::int64_t, const CemaCoefficients&, const Bfloat16*, float*,
                           Bfloat16*, float*, cudaStream_t);
template void cema_backward(const CemaShape&, std::int64_t, const CemaCoefficients&, const float*,
                            const float*, const float*, const CemaBackwardWork&, float*, float*,
                            cudaStream_t);
template void cema_backward(const CemaShape&, std::int64_t, const CemaCoefficients&, const Bfloat16*,
                            const Bfloat16*, const float*, const CemaBackwardWork&, Bfloat16*, float*,
                            cudaStream_t);

}  // namespace megalodon::ops::cuda
