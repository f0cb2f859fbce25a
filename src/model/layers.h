#pragma once
#include <ATen/core/Tensor.h>

#include "model/language_model.h"
#include "model/projection.h"
#include "ops/attention/attention.h"

// What the blocks of both families share.
namespace megalodon::model {

// Drops with probability p where there are keys; gives x itself otherwise. The key is drawn with the object,
// so that what the backward pass computes anew drops the same.
class Drop {
 public:
  Drop(double p, DropoutKeys* keys) : p_(keys != nullptr ? p : 0), key_(p_ > 0 ? keys->next() : 0) {}
  at::Tensor operator()(const at::Tensor& x) const;

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
  at::Tensor start;              // [B] int64 on the CPU: the position of the first token of each row
  StreamState* state = nullptr;  // none: every row starts fresh
  DropoutKeys* dropout = nullptr;
  at::ScalarType compute_type = at::kFloat;  // of activations and products
};

// Writes keys or values [B, L, Hkv, d] of positions start[b] .. into `ring` [B, C, Hkv, d], position p at
// slot p mod C; of more than C positions the last C stay.
void store(const at::Tensor& ring, const at::Tensor& values, const at::Tensor& start);

// ops::attention of queries [B, L, H, dk], keys [B, L, Hkv, dk] and values [B, L, Hkv, dv] of a call at
// `place`: with dropout on the weights where there are keys to drop by, and where there is a state over the
// keys and values "LAYER.k" and "LAYER.v" that it holds, which these join. Returns [B, L, H dv].
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  ops::AttentionOptions options, double dropout, const Place& place, int64_t layer);

}  // namespace megalodon::model
