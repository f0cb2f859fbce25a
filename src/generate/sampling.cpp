#include "generate/sampling.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "base/random.h"

namespace megalodon::generate {

int64_t sample(const at::Tensor& logits, const SamplingOptions& options, uint64_t position) {
  const auto contiguous = logits.cpu().contiguous();
  const float* value = contiguous.const_data_ptr<float>();
  const auto V = static_cast<std::size_t>(contiguous.numel());
  const std::size_t best = static_cast<std::size_t>(std::max_element(value, value + V) - value);
  if (!std::all_of(value, value + V, [](float x) { return std::isfinite(x); })) {
    fail_work("the model's logits are not finite", "position " + std::to_string(position),
              "its weights are damaged");
  }
  if (options.temperature == 0) return static_cast<int64_t>(best);

  std::vector<std::size_t> order(V);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto likelier = [&](std::size_t a, std::size_t b) {
    return value[a] != value[b] ? value[a] > value[b] : a < b;
  };
  const std::size_t kept = options.top_k > 0 ? std::min(V, static_cast<std::size_t>(options.top_k)) : V;
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(), likelier);

  std::vector<double> cumulative(kept);
  double total = 0;
  for (std::size_t i = 0; i < kept; ++i) {
    total += std::exp((static_cast<double>(value[order[i]]) - value[best]) / options.temperature);
    cumulative[i] = total;
  }
  // The nucleus: up to and with the token that reaches top_p.
  const auto nucleus = std::lower_bound(cumulative.begin(), cumulative.end(), options.top_p * total);
  const double mass = nucleus == cumulative.end() ? total : *nucleus;
  const double draw = Random(options.seed, Purpose::sampling, position).uniform() * mass;
  const auto chosen = std::upper_bound(cumulative.begin(), cumulative.end(), draw);
  return static_cast<int64_t>(
      order[std::min(static_cast<std::size_t>(chosen - cumulative.begin()), kept - 1)]);
}

}  // namespace megalodon::generate
