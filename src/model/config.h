#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

#include "base/config.h"
#include "base/json.h"

namespace megalodon::model {

// Megalodon (arXiv 2404.08801). Keys of config.json and of [model] in TOML are the member names.
struct MegalodonConfig {
  int64_t vocab_size = 256;
  int64_t num_layers = 0;
  int64_t model_dim = 0;        // D
  int64_t num_heads = 1;        // H
  int64_t z_dim = 0;            // Z: queries and keys, all heads together
  int64_t value_dim = 0;        // E: values, all heads together
  int64_t ffn_hidden_dim = 0;   // F
  int64_t cema_ndim = 16;       // N
  int64_t chunk_size = 2048;    // c
  int64_t norm_num_groups = 0;  // G
  bool norm_affine = true;      // weights of LayerNorm and RMSNorm (TimestepNorm always has its own)
  double norm_eps = 1e-5;
  double rope_base = 1e4;
  bool swiglu = false;
  bool rescale_nffn = false;  // layer scale on the feed-forward branch
  bool scale_emb = false;     // embedding times sqrt(D)
  bool share_emb = false;     // output projection tied to the embedding
  double dropout = 0, hidden_dropout = 0, attention_dropout = 0;

  int64_t head_dim() const { return z_dim / num_heads; }            // dz
  int64_t value_head_dim() const { return value_dim / num_heads; }  // dv
};

// The Llama-style baseline. Keys are those of Hugging Face's LlamaConfig; `position_embedding` is ours.
struct LlamaConfig {
  int64_t vocab_size = 256;
  int64_t num_hidden_layers = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_attention_heads = 1;
  int64_t num_key_value_heads = 1;
  int64_t head_dim = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 1e4;
  std::string position_embedding = "rope";  // or "none" (NoPE)
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;         // standard deviation of the initial weights; 0: 1/sqrt(fan_in)
  double embedding_initializer_range = 0;  // of the embedding; 0: as of the others
  double dropout = 0;                      // after the embedding and on both branches
  double attention_dropout = 0;
};

using ModelConfig = std::variant<MegalodonConfig, LlamaConfig>;

std::string_view model_type(const ModelConfig& config);  // "megalodon" or "llama"
int64_t vocab_size(const ModelConfig& config);

// Reads [model]: type, an optional preset ("200M", "1.3B", "1.3B-pg19", "7B", "7B-swiglu"), and the members
// above, which override the preset's. `vocabulary` is the default of vocab_size, and its lower bound. Request
// errors name the key.
ModelConfig read_model_config(Config& config, int64_t vocabulary);

// config.json of a model directory, both ways. Reading checks types and shapes as TOML does.
Json to_json(const ModelConfig& config);
ModelConfig from_json(const Json& json, std::string_view where);

}  // namespace megalodon::model
