#include "ops/adamw/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;                        // of 4 elements, of a thread
constexpr int kOfBlock = kThreads * kPacks * 4;  // elements
constexpr int kParts = 64;                       // that one launch takes, in its arguments (4 KB at most)

struct Batch {
  AdamWPart parts[kParts];
  unsigned first_block[kParts + 1];
};

struct Scalars {
  float decay;              // of a parameter
  float rate;               // over the first moment's bias correction
  float second_correction;  // 1 / sqrt of the second moment's bias correction
};

__global__ void prepare(float* steps, const float* rate, const float* skip, AdamWNumbers numbers,
                        Scalars* scalars) {
  *steps += 1 - *skip;
  const double t = *steps;
  scalars->decay = static_cast<float>(*rate * numbers.weight_decay);
  scalars->rate = static_cast<float>(*rate / (1 - pow(numbers.beta1, t)));
  scalars->second_correction = static_cast<float>(1 / sqrt(1 - pow(numbers.beta2, t)));
}

template <int V>
__device__ void update(const AdamWPart& part, std::int64_t first, const Scalars& scalars, float divisor,
                       const AdamWNumbers& numbers) {
  constexpr int kRounds = kPacks * 4 / V;
  const float b1 = static_cast<float>(1 - numbers.beta1), b2 = static_cast<float>(1 - numbers.beta2),
              eps = static_cast<float>(numbers.eps), inverse = 1 / divisor;
#pragma unroll 1  // the warps of a multiprocessor have loads enough under way
  for (int round = 0; round < kRounds; ++round) {
    const std::int64_t i = first + (round * kThreads + threadIdx.x) * V;
    if (i >= part.n) return;
    float p[V], g[V], m[V], v[V];
    load(part.parameter + i, p);
    load(part.gradient + i, g);
    load(part.first_moment + i, m);
    load(part.second_moment + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float g_j = g[j] * inverse;
      m[j] += b1 * (g_j - m[j]);
      v[j] += b2 * (g_j * g_j - v[j]);
      p[j] -= scalars.decay * p[j] + scalars.rate * m[j] / (sqrtf(v[j]) * scalars.second_correction + eps);
    }
    store(p, part.parameter + i);
    if (part.rounded != nullptr) store(p, part.rounded + i);
    store(m, part.first_moment + i);
    store(v, part.second_moment + i);
  }
}

__device__ bool is_packed(const AdamWPart& part) {
  const auto bits = reinterpret_cast<std::uintptr_t>(part.parameter) |
                    reinterpret_cast<std::uintptr_t>(part.gradient) |
                    reinterpret_cast<std::uintptr_t>(part.first_moment) |
                    reinterpret_cast<std::uintptr_t>(part.second_moment);
  return part.n % 4 == 0 && bits % 16 == 0 && reinterpret_cast<std::uintptr_t>(part.rounded) % 8 == 0;
}

__global__ void __launch_bounds__(kThreads)
    step(const __grid_constant__ Batch batch, const Scalars* scalars, const float* divisors,
         const float* skip, const AdamWNumbers numbers) {
  if (*skip == 1) return;
  int at = 0;  // the last part that begins at this block or before
#pragma unroll
  for (int half = kParts / 2; half > 0; half /= 2)
    if (batch.first_block[at + half] <= blockIdx.x) at += half;
  const auto& part = batch.parts[at];
  const std::int64_t first = std::int64_t{blockIdx.x - batch.first_block[at]} * kOfBlock;
  if (is_packed(part)) {
    update<4>(part, first, *scalars, divisors[part.divisor], numbers);
  } else {
    update<1>(part, first, *scalars, divisors[part.divisor], numbers);
  }
}

}  // namespace

void adamw(const std::vector<AdamWPart>& parts, float* steps, const float* divisors, const float* rate,
           const float* skip, const AdamWNumbers& numbers, float* scratch, cudaStream_t stream) {
  auto* const scalars = reinterpret_cast<Scalars*>(scratch);
  prepare<<<1, 1, 0, stream>>>(steps, rate, skip, numbers, scalars);
  for (std::size_t from = 0; from < parts.size(); from += kParts) {
    Batch batch{};
    unsigned blocks = 0;
    for (std::size_t i = 0; i <= kParts; ++i) {
      batch.first_block[i] = blocks;
      if (i == kParts || from + i >= parts.size()) continue;
      batch.parts[i] = parts[from + i];
      blocks += static_cast<unsigned>(ceil_div(parts[from + i].n, kOfBlock));
    }
    if (blocks > 0) step<<<blocks, kThreads, 0, stream>>>(batch, scalars, divisors, skip, numbers);
  }
}

}  // namespace megalodon::ops::cuda
