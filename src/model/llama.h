#pragma once
#include <optional>

#include "model/layers.h"
#include "model/projection.h"

namespace megalodon::model {

// The residual stream [B, L, D], float32 whatever the compute type: in bfloat16 one of five models of 0.5M
// parameters did not learn to carry. What a sub-block adds waits for the next norm, which adds it in passing.
struct Residual {
  at::Tensor x;
  std::optional<Addend> added = {};
  std::optional<Lookup> lookup = {};  // where x is that
};

// One layer of the baseline: h = x + attention(RMSNorm(x)), out = h + SwiGLU(RMSNorm(h)).
struct LlamaBlock {
  LlamaConfig c;
  int64_t layer;
  at::Tensor input_norm, post_norm;  // [D]; of stacked models these are all [K, ...]
  Weight wq, wk, wv, wo;             // [H d, D], [Hkv d, D], [Hkv d, D], [D, H d]
  Weight gate, up, down;             // [F, D], [F, D], [D, F]

  LlamaBlock(const LlamaConfig& config, int64_t layer_index, ParameterMaker& make, const std::string& name);
  // With `last_only`, which needs a state, the last position's alone.
  Residual operator()(const Residual& residual, const Place& place, bool last_only = false) const;

 private:
  struct Attended {
    at::Tensor x;      // the stream
    at::Tensor mixed;  // what its heads make of it
  };
  Attended attention(const NormInput& input, const Place& place) const;
  Attended attention_of_last(const NormInput& input, const Place& place) const;
  // What the feed-forward adds, of SwiGLU's a, b and, where it is made, the hidden rows.
  Addend feed_forward(const SwigluInputs& inputs, const Place& place) const;
  at::Tensor heads(const at::Tensor& x) const;
  at::Tensor turned(const at::Tensor& x, const at::Tensor& start) const;
  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Place& place) const;
};

// The Llama-style baseline: RMSNorm, SwiGLU, rotary or no positions, grouped-query attention. Its files are
// those of Hugging Face's LlamaForCausalLM, names and layout: rotary pairs are adjacent in memory, halves
// apart in files. The state holds all keys and values: where they do not fit it grows to a power of two.
class Llama : public LanguageModel {
 public:
  // One model for each seed.
  Llama(const LlamaConfig& config, const std::vector<uint64_t>& seeds, bool initialise);

  int64_t stack() const override { return stack_; }
  at::Tensor hidden(const at::Tensor& tokens, StreamState* state, DropoutKeys* dropout) const override;
  at::Tensor next_logits(const at::Tensor& tokens, StreamState& state) const override;
  // Without positions and dropout, which count by rows, and where attention has kernels for it.
  bool packs() const override;
  StreamState fresh_state(int64_t batch, int64_t positions) const override;
  void reserve(StreamState& state, int64_t positions) const override;
  at::Tensor to_file(const Parameter& parameter) const override;
  at::Tensor from_file(const Parameter& parameter, const at::Tensor& stored) const override;

 private:
  Llama(const LlamaConfig& config, int64_t stack, ParameterMaker&& make);
  bool is_rotary(const Parameter& parameter) const;
  at::Tensor packed_hidden(const at::Tensor& tokens, const ops::Sequences& sequences) const override;
  // With `last_only` those of the last position alone.
  at::Tensor hidden(const at::Tensor& tokens, const Place& place, bool last_only) const;

  const LlamaConfig c_;
  const int64_t stack_;
  at::Tensor embedding_;  // [V, D]
  std::vector<LlamaBlock> blocks_;
  at::Tensor final_norm_;  // [D]
};

}  // namespace megalodon::model
