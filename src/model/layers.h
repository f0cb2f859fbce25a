#pragma once
#include <ATen/core/Tensor.h>

#include "model/language_model.h"

// What the blocks of both families share.
namespace megalodon::model {

// x W^T + b in the type of x. x [..., in], weight [out, in], bias [out] or undefined.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

// Drops with probability p where there are keys; x itself otherwise.
at::Tensor drop(const at::Tensor& x, double p, DropoutKeys* keys);

// Rows of `table` [V, D] for tokens [B, L], in `type`: [B, L, D].
at::Tensor embed(const at::Tensor& table, const at::Tensor& tokens, at::ScalarType type);

// Where a call stands in its streams.
struct Place {
  at::Tensor start;              // [B] int64: the position of the first token of each row
  StreamState* state = nullptr;  // none: every row starts fresh
  DropoutKeys* dropout = nullptr;
};

// Stores keys and values [B, L, H, d] of positions start .. start+L-1 in a ring of C slots, position p at
// slot p mod C. Of more than C positions the last C stay.
void store_in_ring(at::Tensor& ring, const at::Tensor& values, const at::Tensor& start);

}  // namespace megalodon::model
