#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "model/language_model.h"
#include "model/projection.h"
#include "ops/attention/attention.h"
#include "ops/packed_attention/packed_attention.h"
#include "ops/timestep_norm/timestep_norm.h"

// What the blocks of both families share.
namespace megalodon::model {

// Drops with probability p where there are keys; gives x itself otherwise. The key is drawn with the object,
// so that what the backward pass computes anew drops the same.
class Drop {
 public:
  Drop(double p, DropoutKeys* keys) : p_(keys != nullptr ? p : 0), key_(p_ > 0 ? keys->next() : 0) {}
  Drop(double p, int64_t key) : p_(p), key_(key) {}
  at::Tensor operator()(const at::Tensor& x) const;
  double p() const { return p_; }
  int64_t key() const { return key_; }

 private:
  double p_;
  int64_t key_;
};
at::Tensor drop(const at::Tensor& x, double p, DropoutKeys* keys);

// Rows of `table` [V, D] for tokens [B, L], in `type`: [B, L, D]. A table [K, V, D] of stacked models serves
// each its share of B.
at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, at::ScalarType type);

// Where a call stands in its streams.
struct Place {
  at::Tensor start;             // [B] int64: the position of the first token of each row
  StreamState* state;           // none: every row starts fresh
  DropoutKeys* dropout;         // none: nothing is dropped
  at::ScalarType compute_type;  // of activations and products
  // The first position of every row, where it is known to be one. Never for a single token on a device: what
  // is launched for it is the same at every position, so that it can be recorded.
  std::optional<int64_t> common_start;
  const ops::Sequences* sequences = nullptr;  // of the rows, where these are packed
  ops::TimestepNormState fresh_norm = {};     // what timestep norms start from without a state
  bool recomputes = true;                     // in the backward pass (LanguageModel::set_recomputation)

  // That of tokens [B, L] that go on from `state`.
  Place(const at::Tensor& tokens, StreamState* state, DropoutKeys* dropout, at::ScalarType compute_type);
  // The same place L tokens further.
  Place after(int64_t L) const;
};

// Writes keys or values [B, L, Hkv, d] of the positions from place.start on into the rings [B, C, Hkv, d],
// position p at slot p mod C; of more than C positions the last C stay.
void store(at::TensorList rings, at::TensorList values, const Place& place);

// ops::attention of queries [B, L, H, dk], keys [B, L, Hkv, dk] and values [B, L, Hkv, dv] of a call at
// `place`: with dropout on the weights where there are keys to drop by, and where there is a state over the
// keys and values "LAYER.k" and "LAYER.v" that it holds, which these join. Returns [B, L, H dv].
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  ops::AttentionOptions options, double dropout, const Place& place, int64_t layer);

}  // namespace megalodon::model
