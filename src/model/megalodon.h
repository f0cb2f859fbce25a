#pragma once
#include "model/feed_forward.h"
#include "model/gated_attention.h"
#include "model/language_model.h"

namespace megalodon::model {

// One layer: y = x + attention(x), out = x + FFN(y).
struct MegalodonBlock {
  GatedAttention mega;
  FeedForward nffn;

  at::Tensor operator()(const at::Tensor& x, const Place& place) const {
    const auto [y, residual] = mega(x, place);
    return nffn(y, residual, place);
  }
};

// Megalodon (arXiv 2404.08801). Parameter names are those of the authors' code.
class Megalodon : public LanguageModel {
 public:
  Megalodon(const MegalodonConfig& config, uint64_t seed, bool initialise);

  at::Tensor hidden(const at::Tensor& tokens, StreamState* state, DropoutKeys* dropout) const override;
  StreamState fresh_state(int64_t batch, int64_t positions) const override;

 private:
  Megalodon(const MegalodonConfig& config, ParameterMaker&& make);

  const MegalodonConfig c_;
  at::Tensor embedding_;  // [V, D]
  std::vector<MegalodonBlock> blocks_;
  TimestepNorm final_norm_;
};

}  // namespace megalodon::model
