#include "model/layers.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ops/cache_store/cache_store.h"
#include "ops/dropout/dropout.h"
#include "ops/embedding/embedding.h"

namespace megalodon::model {
namespace {

// Whether no query of a call sees a key from before it.
bool sees_itself_alone(const Place& place, const ops::AttentionOptions& options) {
  if (!place.common_start) return false;
  return *place.common_start == 0 ||
         (options.chunk > 0 && options.previous_chunks == 0 && *place.common_start % options.chunk == 0);
}

}  // namespace

at::Tensor Drop::operator()(const at::Tensor& x) const {
  return p_ > 0 ? ops::dropout(x, p_, key_) : x;
}

at::Tensor drop(const at::Tensor& x, double p, DropoutKeys* keys) {
  return Drop(p, keys)(x);
}

at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, at::ScalarType type) {
  if (table.dim() == 2) return ops::embedding(table, tokens).to(type);
  const int64_t K = table.size(0), V = table.size(1);
  const auto first = at::arange(K, tokens.options()).view({K, 1, 1}) * V;  // the rows of each model
  return ops::embedding(table.flatten(0, 1), tokens.unflatten(0, {K, -1}) + first).flatten(0, 1).to(type);
}

Place::Place(const at::Tensor& tokens, StreamState* state_, DropoutKeys* dropout_, at::ScalarType type)
    : start(state_ != nullptr ? state_->position : at::zeros({tokens.size(0)}, tokens.options())),
      state(state_),
      dropout(dropout_),
      compute_type(type) {
  if (state == nullptr) {
    common_start = 0;
  } else if (tokens.size(1) > 1 || tokens.is_cpu()) {
    common_start = state->common_position();
  }
}

Place Place::after(int64_t L) const {
  Place further = *this;
  further.start = start + L;
  if (common_start) further.common_start = *common_start + L;
  return further;
}

void store(at::TensorList rings, at::TensorList values, const Place& place) {
  if (!place.common_start || place.start.is_cuda()) return ops::cache_store(rings, values, place.start);
  for (std::size_t i = 0; i < rings.size(); ++i) {
    const auto& ring = rings[i];
    const int64_t L = values[i].size(1), C = ring.size(1), kept = std::min(L, C), first = L - kept;
    const auto last = values[i].narrow(1, first, kept);  // [B, kept, Hkv, d]
    const int64_t slot = (*place.common_start + first) % C, fitting = std::min(kept, C - slot);
    ring.narrow(1, slot, fitting).copy_(last.narrow(1, 0, fitting));
    ring.narrow(1, 0, kept - fitting).copy_(last.narrow(1, fitting, kept - fitting));
  }
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  ops::AttentionOptions options, double dropout, const Place& place, int64_t layer) {
  if (place.sequences != nullptr) {
    return ops::packed_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *place.sequences,
                                 options.scale)
        .view({q.size(0), q.size(1), -1});
  }
  if (place.dropout != nullptr && dropout > 0) {
    options.dropout = dropout;
    options.dropout_key = place.dropout->next();
  }
  if (place.state == nullptr) return ops::attention(q, k, v, place.start, options).flatten(2);

  auto& ring_k = place.state->layer(layer, "k");  // [B, C, Hkv, dk], position p at slot p mod C
  auto& ring_v = place.state->layer(layer, "v");  // [B, C, Hkv, dv]
  const bool alone = sees_itself_alone(place, options);
  if (!alone && options.dropout == 0 && place.start.is_cuda())
    return ops::attention_and_store(q, k, v, place.start, options, {ring_k, ring_v}).flatten(2);
  const auto cache = alone ? std::nullopt : std::optional(ops::AttentionCache{ring_k, ring_v});
  const auto o = ops::attention(q, k, v, place.start, options, cache);
  store({ring_k, ring_v}, {k, v}, place);
  return o.flatten(2);
}

}  // namespace megalodon::model
