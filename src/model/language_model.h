#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "model/config.h"
#include "model/parameters.h"
#include "model/stream_state.h"
#include "ops/packed_attention/packed_attention.h"

namespace megalodon::model {

// The dropout masks of one training step: a new key for each place that drops, a function of (seed, step,
// order) alone.
class DropoutKeys {
 public:
  DropoutKeys(uint64_t seed, uint64_t step) : seed_(seed), step_(step) {}
  int64_t next();

 private:
  uint64_t seed_, step_, used_ = 0;
};

// What training, evaluation and generation see of a model: tokens and state in, logits and state out.
class LanguageModel {
 public:
  explicit LanguageModel(ModelConfig config) : config_(std::move(config)) {}
  virtual ~LanguageModel() = default;
  LanguageModel(const LanguageModel&) = delete;
  LanguageModel& operator=(const LanguageModel&) = delete;

  const ModelConfig& config() const { return config_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t parameter_count() const;

  // Models of one shape that run side by side as one: their weights are stacked, [K, ...], and rows k B/K ..
  // (k+1) B/K - 1 of a batch of B belong to model k. 1 for an ordinary model.
  virtual int64_t stack() const { return 1; }

  // Moves all parameters, and with them what the model makes; tokens and states must be on its device.
  void to(at::Device device);
  at::Device device() const { return parameters_.empty() ? at::kCPU : parameters_.front().value.device(); }

  // Type of activations and matrix products: float32 (default) or bfloat16. Parameters are cast where they
  // are used, unless their values in it are kept.
  void set_compute_type(at::ScalarType type) { compute_type_ = type; }
  at::ScalarType compute_type() const { return compute_type_; }
  // The model only answers from here on: its matrices are in the compute type. Before to(), so that a GPU has
  // no room for others.
  void round_matrices();
  // Keeps the values of linear layers in the compute type beside them, where that is another than their own,
  // and brings them up to date: for training, whose optimizer then writes both. Weights that change otherwise
  // are cast where they are used, until this is called again.
  void keep_rounded() const;

  // Whether products of linear layers, those of gradients too, are made in float8 where their sizes are
  // multiples of 16: by a GPU that has units for it, or in float32 of the same numbers.
  void set_float8_products(bool in_float8);

  // Whether a training step keeps only what is dear to compute and computes the rest again for the gradients
  // (default), or keeps all of it: a little faster, in much more memory. The numbers are the same.
  // Megalodon's.
  void set_recomputation(bool recomputes) { recomputes_ = recomputes; }
  bool recomputes() const { return recomputes_; }

  // The last hidden states, normalized: [B, L, D]. tokens [B, L] int64.
  // With a state the streams go on from it, and it moves on by L; the streams of a batch may be at different
  // positions. Any split of a sequence into calls gives the same result. Without a state every stream starts
  // fresh. With dropout keys the model drops as configured (training); without, never.
  virtual at::Tensor hidden(const at::Tensor& tokens, StreamState* state = nullptr,
                            DropoutKeys* dropout = nullptr) const = 0;
  // Logits [..., V] float32 of hidden states [..., D].
  virtual at::Tensor logits(const at::Tensor& hidden) const;
  at::Tensor forward(const at::Tensor& tokens, StreamState* state = nullptr,
                     DropoutKeys* dropout = nullptr) const {
    return logits(hidden(tokens, state, dropout));
  }

  // The mean loss in nats of those targets [B, L] that are not ops::kIgnoredTarget, a number; of a stack each
  // model's, [K]. tokens [B, L]. The logits are never all in memory.
  at::Tensor mean_loss(const at::Tensor& tokens, const at::Tensor& targets,
                       DropoutKeys* dropout = nullptr) const;

  // Whether it trains on packed sequences.
  virtual bool packs() const { return false; }
  // The same of sequences that lie one after the other: tokens, targets [1, T], of a stack [K, T], each model
  // its row; `sequences` are those of all these tokens, none across two rows.
  at::Tensor mean_loss(const at::Tensor& tokens, const at::Tensor& targets,
                       const ops::Sequences& sequences) const;

  // Logits [B, V] of the token after the last of each row, going on from the state: as forward() gives them
  // for the last position, without the work for what only other positions' logits need.
  virtual at::Tensor next_logits(const at::Tensor& tokens, StreamState& state) const;

  // Room for `positions` where the state grows with the position: more is made when they are needed.
  virtual StreamState fresh_state(int64_t batch, int64_t positions = 64) const = 0;
  virtual void reserve(StreamState& /*state*/, int64_t /*positions*/) const {}
  // The state becomes a fresh one in its own tensors. Keys and values stay where they are: none is seen that
  // was not read again.
  void restart(StreamState& state) const;

  // How a parameter is laid out in files, where that differs from memory (Llama's rotary pairs).
  virtual at::Tensor to_file(const Parameter& parameter) const { return parameter.value; }
  virtual at::Tensor from_file(const Parameter&, const at::Tensor& stored) const { return stored; }

 protected:
  // hidden() of packed sequences; where packs() holds.
  virtual at::Tensor packed_hidden(const at::Tensor& tokens, const ops::Sequences& sequences) const;

  // `output`, one of the parameters, makes the logits: [V, D], of a stack [K, V, D].
  void adopt(std::vector<Parameter> parameters, at::Tensor output) {
    parameters_ = std::move(parameters);
    output_ = std::move(output);
  }

 private:
  ModelConfig config_;
  std::vector<Parameter> parameters_;
  at::Tensor output_;
  at::ScalarType compute_type_ = at::kFloat;
  bool recomputes_ = true;
};

// A model with initial weights drawn from `seed`, or with weights left for a file to fill.
std::unique_ptr<LanguageModel> make_model(const ModelConfig& config, uint64_t seed, bool initialise = true);

// K models of one shape with initial weights drawn from a seed each, stacked; with one seed, make_model. The
// Llama baseline alone: request error.
std::unique_ptr<LanguageModel> make_stack(const ModelConfig& config, const std::vector<uint64_t>& seeds);
// Model k of a stack as an ordinary model that shares its weights.
std::unique_ptr<LanguageModel> member(const LanguageModel& stack, int64_t k);

// A hash of the configuration: states and checkpoints name the model they belong to by it.
std::string fingerprint(const ModelConfig& config);

}  // namespace megalodon::model
