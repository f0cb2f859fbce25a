#include <ATen/ATen.h>

#include "ops/attention/attention.h"
#include "ops/packed_attention/packed_attention.h"

namespace megalodon::ops {

at::Tensor packed_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const Sequences& sequences, double scale) {
  const auto borders = sequences.borders.cpu();
  const auto* border = borders.const_data_ptr<int32_t>();
  const auto start = at::zeros({1}, sequences.borders.options().dtype(at::kLong));
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i + 1 < borders.numel(); ++i) {
    if (border[i + 1] == border[i]) continue;
    const auto part = [&](const at::Tensor& x) {
      return x.narrow(0, border[i], border[i + 1] - border[i]).unsqueeze(0);
    };
    parts.push_back(attention_reference(part(q), part(k), part(v), start, {.scale = scale}).squeeze(0));
  }
  return parts.empty() ? at::empty({0, q.size(1), v.size(2)}, q.options()) : at::cat(parts);
}

}  // namespace megalodon::ops
