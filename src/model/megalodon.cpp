#include "model/megalodon.h"

#include <ATen/ATen.h>

#include <cmath>

namespace megalodon::model {
namespace {

at::Tensor token_matrix(ParameterMaker& make, const std::string& name, const MegalodonConfig& c) {
  const double deviation = 1 / std::sqrt(static_cast<double>(c.model_dim));
  return make.truncated_normal(name, {c.vocab_size, c.model_dim}, deviation, 3 * deviation);
}

std::vector<MegalodonBlock> make_blocks(ParameterMaker& make, const MegalodonConfig& c) {
  std::vector<MegalodonBlock> blocks;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string name = "layers." + std::to_string(i);
    GatedAttention mega(c, i, make, name + ".mega");
    blocks.push_back({std::move(mega), FeedForward(c, i, make, name + ".nffn")});
  }
  return blocks;
}

}  // namespace

Megalodon::Megalodon(const MegalodonConfig& config, uint64_t seed, bool initialise)
    : Megalodon(config, ParameterMaker({seed}, initialise)) {}

Megalodon::Megalodon(const MegalodonConfig& config, ParameterMaker&& make)
    : LanguageModel(config),
      c_(config),
      embedding_(token_matrix(make, "embed.weight", config)),
      blocks_(make_blocks(make, config)),
      final_norm_(config, make, "output.final_norm") {
  const auto output = config.share_emb ? embedding_ : token_matrix(make, "output.output.weight", config);
  adopt(make.take(), output);
}

at::Tensor Megalodon::hidden(const at::Tensor& tokens, StreamState* state, DropoutKeys* dropout) const {
  const int64_t B = tokens.size(0), L = tokens.size(1);
  Place place(tokens, state, dropout, compute_type());
  place.recomputes = recomputes();
  if (state == nullptr) {
    const auto mean = at::zeros({B, c_.norm_num_groups}, at::TensorOptions(device()).dtype(at::kFloat));
    place.fresh_norm = {at::zeros({B}, mean.options().dtype(at::kLong)), mean, at::ones_like(mean)};
  }
  auto x = embed(embedding_, tokens, compute_type());  // [B, L, D]
  if (c_.scale_emb) x = x * std::sqrt(static_cast<double>(c_.model_dim));
  x = drop(x, c_.dropout, dropout);
  if (state != nullptr) state->advance(L);  // here, so that kernels of a recorded step follow each other
  for (const auto& block : blocks_) x = block(x, place);
  return final_norm_(x, place, -1);
}

StreamState Megalodon::fresh_state(int64_t batch, int64_t /*positions*/) const {
  const auto statistics = at::TensorOptions(device()).dtype(at::kFloat),
             activations = statistics.dtype(compute_type());
  StreamState state;
  state.model = fingerprint(config());
  state.position = at::zeros({batch}, statistics.dtype(at::kLong));
  const auto norm = [&](const std::string& name) {
    state.tensors[name + "count"] = at::zeros({batch}, state.position.options());
    state.tensors[name + "mean"] = at::zeros({batch, c_.norm_num_groups}, statistics);
    state.tensors[name + "var"] = at::ones({batch, c_.norm_num_groups}, statistics);
  };
  for (int64_t i = 0; i < c_.num_layers; ++i) {
    const std::string layer = std::to_string(i) + ".";
    norm(layer + "norm_");
    state.tensors[layer + "cema"] = at::zeros({batch, c_.model_dim, c_.cema_ndim, 2}, statistics);
    state.tensors[layer + "k"] = at::zeros({batch, c_.chunk_size, c_.num_heads, c_.head_dim()}, activations);
    state.tensors[layer + "v"] =
        at::zeros({batch, c_.chunk_size, c_.num_heads, c_.value_head_dim()}, activations);
  }
  norm("final_norm_");
  return state;
}

}  // namespace megalodon::model
