#include <ATen/ATen.h>

#include "base/random.h"
#include "ops/dropout/dropout.h"
#include "ops/dropout/kernel.h"

namespace megalodon::ops {

at::Tensor dropout_reference(const at::Tensor& x, double p, int64_t key) {
  const auto kept = at::empty(x.sizes(), at::kBool);
  auto* const keep = kept.mutable_data_ptr<bool>();
  const auto threshold = dropout_threshold(p);
  for (int64_t i = 0; i < x.numel(); i += 4) {
    const auto words = philox(static_cast<uint64_t>(key), static_cast<uint64_t>(i / 4), 0);
    for (int64_t j = 0; j < std::min<int64_t>(4, x.numel() - i); ++j)
      keep[i + j] = words[static_cast<std::size_t>(j)] >= threshold;
  }
  return x * kept.to(x.options()) * (1 / (1 - p));
}

}  // namespace megalodon::ops
