#include "model/llama.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "model/gated_projection.h"
#include "ops/rope/rope.h"

namespace megalodon::model {
namespace {

double deviation(double range, int64_t in) {
  return range > 0 ? range : 1 / std::sqrt(static_cast<double>(in));
}

at::Tensor table(ParameterMaker& make, const std::string& name, const LlamaConfig& c, double range) {
  return make.normal(name, {c.vocab_size, c.hidden_size}, deviation(range, c.hidden_size));
}

double embedding_range(const LlamaConfig& c) {
  return c.embedding_initializer_range > 0 ? c.embedding_initializer_range : c.initializer_range;
}

bool drops(const LlamaConfig& c, const Place& place) {
  return c.dropout > 0 && place.dropout != nullptr;
}

NormInput norm_input(const Residual& r, const at::Tensor& factor, const LlamaConfig& c,
                     at::ScalarType compute_type) {
  return {r.x, r.added, factor, c.rms_norm_eps, compute_type, r.lookup};
}

at::Tensor last(const at::Tensor& x) {  // of the positions, dimension 1
  return x.narrow(1, x.size(1) - 1, 1).contiguous();
}

std::vector<LlamaBlock> make_blocks(ParameterMaker& make, const LlamaConfig& c) {
  std::vector<LlamaBlock> blocks;
  blocks.reserve(static_cast<std::size_t>(c.num_hidden_layers));
  for (int64_t i = 0; i < c.num_hidden_layers; ++i)
    blocks.emplace_back(c, i, make, "model.layers." + std::to_string(i));
  return blocks;
}

}  // namespace

LlamaBlock::LlamaBlock(const LlamaConfig& config, int64_t layer_index, ParameterMaker& make,
                       const std::string& name)
    : c(config), layer(layer_index) {
  const int64_t D = c.hidden_size, F = c.intermediate_size, d = c.head_dim;
  const auto weight = [&](const std::string& part, int64_t out, int64_t in) {
    return make.weight(name + "." + part + ".weight", {out, in}, deviation(c.initializer_range, in));
  };
  input_norm = make.constant(name + ".input_layernorm.weight", {D}, 1);
  wq = weight("self_attn.q_proj", c.num_attention_heads * d, D);
  wk = weight("self_attn.k_proj", c.num_key_value_heads * d, D);
  wv = weight("self_attn.v_proj", c.num_key_value_heads * d, D);
  wo = weight("self_attn.o_proj", D, c.num_attention_heads * d);
  post_norm = make.constant(name + ".post_attention_layernorm.weight", {D}, 1);
  gate = weight("mlp.gate_proj", F, D);
  up = weight("mlp.up_proj", F, D);
  down = weight("mlp.down_proj", D, F);
  Weight::lay_together({gate, up});
  if (c.position_embedding == "none") Weight::lay_together({wk, wv, wq});  // the rotation wants them apart
}

Residual LlamaBlock::operator()(const Residual& residual, const Place& place, bool last_only) const {
  const auto input = norm_input(residual, input_norm, c, place.compute_type);
  const auto [x, mixed] = last_only ? attention_of_last(input, place) : attention(input, place);  // [B, L, D]
  const Residual then{x, drops(c, place) ? Addend{drop(project(mixed, wo), c.dropout, place.dropout)}
                                         : project_for_norm(mixed, wo, {{gate}, {up}})};
  const auto [h, inputs] =
      norm_and_project_for_swiglu(norm_input(then, post_norm, c, place.compute_type), gate, up);
  return {h, feed_forward(inputs, place)};
}

Addend LlamaBlock::feed_forward(const SwigluInputs& inputs, const Place& place) const {
  const auto& [a, b, hidden] = inputs;  // [B, L, F]
  SwigluOptions options{.hidden = hidden, .keeps_hidden = true};
  // The next norm takes the product if it is one of all positions.
  if (hidden.defined() && !drops(c, place) && place.state == nullptr) {
    options.product = layer + 1 < c.num_hidden_layers ? leave_to_norm(hidden, down, {{wk}, {wv}, {wq}})
                                                      : leave_to_norm(hidden, down, {});
  }
  const auto out = project_swiglu(a, b, down, Drop(0, nullptr), options);
  return {drop(out, c.dropout, place.dropout), options.product};
}

at::Tensor LlamaBlock::heads(const at::Tensor& x) const {
  return x.unflatten(-1, {-1, c.head_dim});
}

at::Tensor LlamaBlock::turned(const at::Tensor& x, const at::Tensor& start) const {
  return c.position_embedding == "rope" ? ops::rope(heads(x), start, 0, c.rope_theta) : heads(x);
}

LlamaBlock::Attended LlamaBlock::attention(const NormInput& input, const Place& place) const {
  const auto [x, projected] = norm_and_project(input, {{wk}, {wv}, {wq}});
  const auto k = turned(projected[0], place.start), v = heads(projected[1]);  // [B, L, Hkv, d]
  return {x, attend(turned(projected[2], place.start), k, v, place)};
}

LlamaBlock::Attended LlamaBlock::attention_of_last(const NormInput& input, const Place& place) const {
  const auto [x, u] = norm(input);
  const auto projected = project(u, {{wk}, {wv}});
  const auto k = turned(projected[0], place.start), v = heads(projected[1]);
  // The keys before the last join the state; the last query, key and value go on from there.
  const int64_t before = u.size(1) - 1;
  store({place.state->layer(layer, "k"), place.state->layer(layer, "v")},
        {k.narrow(1, 0, before), v.narrow(1, 0, before)}, place);
  const auto here = place.after(before);
  return {last(x), attend(turned(project(last(u), wq), here.start), last(k), last(v), here)};
}

at::Tensor LlamaBlock::attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const Place& place) const {
  return model::attend(q, k, v, {.scale = 1 / std::sqrt(static_cast<double>(c.head_dim))},
                       c.attention_dropout, place, layer);
}

Llama::Llama(const LlamaConfig& config, const std::vector<uint64_t>& seeds, bool initialise)
    : Llama(config, static_cast<int64_t>(seeds.size()), ParameterMaker(seeds, initialise)) {}

Llama::Llama(const LlamaConfig& config, int64_t stack, ParameterMaker&& make)
    : LanguageModel(config),
      c_(config),
      stack_(stack),
      embedding_(table(make, "model.embed_tokens.weight", config, embedding_range(config))),
      blocks_(make_blocks(make, config)),
      final_norm_(make.constant("model.norm.weight", {config.hidden_size}, 1)) {
  const auto output = config.tie_word_embeddings
                          ? embedding_
                          : table(make, "lm_head.weight", config, config.initializer_range);
  adopt(make.take(), output);
}

at::Tensor Llama::hidden(const at::Tensor& tokens, const Place& place, bool last_only) const {
  const int64_t L = tokens.size(1);
  if (place.state != nullptr) reserve(*place.state, place.state->highest + L);
  Residual x{drop(embed(embedding_, tokens, at::kFloat), c_.dropout, place.dropout)};
  if (!drops(c_, place)) x.lookup = {embedding_, tokens};
  for (const auto& block : blocks_)
    x = block(x, place, last_only && L > 1 && block.layer + 1 == c_.num_hidden_layers);
  if (place.state != nullptr) place.state->advance(L);
  return norm(norm_input(x, final_norm_, c_, compute_type())).normal;
}

at::Tensor Llama::hidden(const at::Tensor& tokens, StreamState* state, DropoutKeys* dropout) const {
  return hidden(tokens, Place(tokens, state, dropout, compute_type()), false);
}

at::Tensor Llama::next_logits(const at::Tensor& tokens, StreamState& state) const {
  return logits(hidden(tokens, Place(tokens, &state, nullptr, compute_type()), true)).squeeze(1);
}

bool Llama::packs() const {
  return c_.position_embedding == "none" && c_.dropout == 0 && c_.attention_dropout == 0 &&
         ops::has_packed_kernel(device(), compute_type(), c_.head_dim, c_.head_dim);
}

at::Tensor Llama::packed_hidden(const at::Tensor& tokens, const ops::Sequences& sequences) const {
  Place place(tokens, nullptr, nullptr, compute_type());
  place.sequences = &sequences;
  return hidden(tokens, place, false);
}

StreamState Llama::fresh_state(int64_t batch, int64_t positions) const {
  const auto activations = at::TensorOptions(device()).dtype(compute_type());
  StreamState state;
  state.model = fingerprint(config());
  state.position = at::zeros({batch}, activations.dtype(at::kLong));
  for (int64_t i = 0; i < c_.num_hidden_layers; ++i) {
    for (const char* name : {".k", ".v"}) {
      state.tensors[std::to_string(i) + name] = at::zeros(
          {batch, std::max<int64_t>(positions, 1), c_.num_key_value_heads, c_.head_dim}, activations);
    }
  }
  return state;
}

void Llama::reserve(StreamState& state, int64_t positions) const {
  for (auto& [name, tensor] : state.tensors) {
    if (positions <= tensor.size(1)) continue;
    const auto grown = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(positions)));
    tensor = at::constant_pad_nd(tensor, {0, 0, 0, 0, 0, grown - tensor.size(1)});
  }
}

bool Llama::is_rotary(const Parameter& parameter) const {
  return c_.position_embedding == "rope" &&
         (parameter.name.ends_with("q_proj.weight") || parameter.name.ends_with("k_proj.weight"));
}

// Row 2i+s of a head in memory is row i+s*d/2 in a file.
at::Tensor Llama::to_file(const Parameter& parameter) const {
  if (!is_rotary(parameter)) return parameter.value;
  const auto& w = parameter.value;
  return w.view({-1, c_.head_dim / 2, 2, w.size(1)}).transpose(1, 2).reshape(w.sizes());
}

at::Tensor Llama::from_file(const Parameter& parameter, const at::Tensor& stored) const {
  if (!is_rotary(parameter)) return stored;
  return stored.view({-1, 2, c_.head_dim / 2, stored.size(1)}).transpose(1, 2).reshape(stored.sizes());
}

}  // namespace megalodon::model
