#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "model/language_model.h"
#include "ops/testing.h"

namespace megalodon::model {
namespace {

MegalodonConfig megalodon(int64_t layers) {
  MegalodonConfig c;
  c.num_layers = layers;
  c.model_dim = 64;
  c.num_heads = 2;
  c.z_dim = 32;
  c.value_dim = 128;
  c.ffn_hidden_dim = 160;
  c.cema_ndim = 4;
  c.chunk_size = 128;
  c.norm_num_groups = 8;
  return c;
}

LlamaConfig llama(int64_t layers) {
  LlamaConfig c;
  c.num_hidden_layers = layers;
  c.hidden_size = 64;
  c.intermediate_size = 160;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 16;
  return c;
}

// Bytes that one more layer keeps of a forward pass over `tokens` tokens in bfloat16.
template <class Config>
double kept_by_a_layer(Config config(int64_t), int64_t tokens, bool recomputes = true) {
  const auto kept = [&](int64_t layers) {
    const auto model = make_model(config(layers), 1);
    model->set_compute_type(at::kBFloat16);
    model->set_recomputation(recomputes);
    const ops::testing::CountedMemory memory;
    const auto hidden = model->hidden(at::zeros({1, tokens}, at::kLong));
    return static_cast<double>(memory.now());
  };
  return kept(3) - kept(2);
}

// What is not counted does not grow with the tokens: CEMA's coefficients above all.
template <class Config>
void expect_kept(Config config(int64_t), double bytes_a_token, bool recomputes = true) {
  constexpr double T = 2048;
  const double kept =
      (kept_by_a_layer(config, 2 * T, recomputes) - kept_by_a_layer(config, T, recomputes)) / T;
  EXPECT_NEAR(kept, bytes_a_token, 0.002 * bytes_a_token);
}

TEST(Memory, OfATokenAndMegalodonLayer) {
  const auto c = megalodon(1);
  const auto D = c.model_dim, Z = c.z_dim, E = c.value_dim, F = c.ffn_hidden_dim;
  const auto activations = 3 * D    // the block's input, the moving average, the attention's output
                           + Z      // queries and keys before their norm
                           + 3 * E  // values and gate before their activation, attention
                           + F;     // feed-forward before its activation
  const auto statistics = 2 * c.norm_num_groups + 3 + c.num_heads;
  expect_kept(megalodon, static_cast<double>(2 * activations + 4 * statistics));
  const auto normalized = 3 * D;  // by timestep norm, RMSNorm and LayerNorm
  const auto others = 2 * Z + E;  // queries, keys, values
  expect_kept(megalodon, static_cast<double>(2 * (activations + normalized + others) + 4 * statistics),
              false);
}

TEST(Memory, OfATokenAndLlamaLayer) {
  const auto c = llama(1);
  const auto D = c.hidden_size, F = c.intermediate_size, H = c.num_attention_heads, d = c.head_dim;
  const auto activations = 2 * D + 2 * (H + c.num_key_value_heads) * d + 3 * F;
  const auto numbers = 2 * D + 2 + H;  // the residual stream is float32
  expect_kept(llama, static_cast<double>(2 * activations + 4 * numbers));
}

TEST(Memory, HoldsNoCopiesOfWeights) {
  const auto weights = [](const auto& config) {
    double elements = 0;
    const auto model = make_model(config, 1);
    for (const auto& parameter : model->parameters()) {
      if (parameter.is_matrix && parameter.name.find("layers.0.") != std::string::npos)
        elements += static_cast<double>(parameter.value.numel());
    }
    return 2 * elements;  // in bfloat16
  };
  EXPECT_LT(kept_by_a_layer(megalodon, 1), 0.3 * weights(megalodon(1)));
  EXPECT_LT(kept_by_a_layer(llama, 1), 0.3 * weights(llama(1)));
}

}  // namespace
}  // namespace megalodon::model
