#include "model/layers.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ops/dropout/dropout.h"

namespace megalodon::model {

at::Tensor Drop::operator()(const at::Tensor& x) const {
  return p_ > 0 ? ops::dropout(x, p_, key_) : x;
}

at::Tensor drop(const at::Tensor& x, double p, DropoutKeys* keys) {
  return Drop(p, keys)(x);
}

at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, at::ScalarType type) {
  if (table.dim() == 2) return at::embedding(table, tokens).to(type);
  const int64_t K = table.size(0), V = table.size(1);
  const auto first = at::arange(K, tokens.options()).view({K, 1, 1}) * V;  // the rows of each model
  return at::embedding(table.flatten(0, 1), tokens.unflatten(0, {K, -1}) + first).flatten(0, 1).to(type);
}

void store(const at::Tensor& ring, const at::Tensor& values, const at::Tensor& start) {
  const int64_t B = values.size(0), L = values.size(1), C = ring.size(1), kept = std::min(L, C),
                first = L - kept;
  if (kept == 0) return;
  const auto last = values.narrow(1, first, kept);  // [B, kept, Hkv, d]
  if (start.is_cpu()) {                             // a look at other devices would wait for them
    const auto* const from = start.const_data_ptr<int64_t>();
    const int64_t slot = (from[0] + first) % C;
    if (slot + kept <= C && std::all_of(from, from + B, [&](int64_t p) { return p == from[0]; })) {
      ring.narrow(1, slot, kept).copy_(last);
      return;
    }
  }
  const auto row = at::arange(B, start.options()).unsqueeze(1) * C;                              // [B, 1]
  const auto slots = (start.unsqueeze(1) + at::arange(first, L, start.options())).remainder(C);  // [B, kept]
  ring.view({B * C, -1})
      .index_copy_(0, (row + slots).view(-1), last.to(ring.scalar_type()).reshape({B * kept, -1}));
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  ops::AttentionOptions options, double dropout, const Place& place, int64_t layer) {
  if (place.dropout != nullptr && dropout > 0) {
    options.dropout = dropout;
    options.dropout_key = place.dropout->next();
  }
  if (place.state == nullptr) return ops::attention(q, k, v, place.start, options).flatten(2);

  auto& ring_k = place.state->layer(layer, "k");  // [B, C, Hkv, dk], position p at slot p mod C
  auto& ring_v = place.state->layer(layer, "v");  // [B, C, Hkv, dv]
  const auto o = ops::attention(q, k, v, place.start, options, ops::AttentionCache{ring_k, ring_v});
  store(ring_k, k, place.start);
  store(ring_v, v, place.start);
  return o.flatten(2);
}

}  // namespace megalodon::model
