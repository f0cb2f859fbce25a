#pragma once
#include <functional>
#include <span>

#include "model/language_model.h"

namespace megalodon::model {

// Token ids as a tensor [1, n] int64.
at::Tensor tokens_tensor(std::span<const int32_t> ids);

struct StreamOptions {
  int64_t piece = 0;  // tokens a call; 0: two chunks of Megalodon, 2048 for the baseline
  // The reference's way at inference (Megalodon alone): after a call of two chunks that ends at e >= 8 chunks
  // with input left, the carried norm statistics are replaced by those of a fresh pass over the last 6
  // chunks.
  bool truncate_statistics = false;
};

// Reads tokens [B, L] of any length at constant memory, going on from `state`: in pieces that end at
// multiples of the piece size, so that chunks stay whole. `visit(offset, hidden)` sees the hidden states [B,
// l, D] of tokens offset .. offset+l-1. All streams must be at one position. Runs without gradients.
void stream(const LanguageModel& model, const at::Tensor& tokens, StreamState& state,
            const StreamOptions& options,
            const std::function<void(int64_t offset, const at::Tensor& hidden)>& visit);

}  // namespace megalodon::model
