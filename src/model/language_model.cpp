#include "model/language_model.h"

#include <ATen/ATen.h>

#include "base/error.h"
#include "base/hash.h"
#include "base/random.h"
#include "model/llama.h"
#include "model/megalodon.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"

namespace megalodon::model {
namespace {

at::Tensor mean_loss_of(const at::Tensor& hidden, const at::Tensor& output, const at::Tensor& targets) {
  return ops::linear_cross_entropy(hidden.flatten(0, 1), output, targets.flatten());
}

}  // namespace

int64_t DropoutKeys::next() {
  const auto words = philox(random_key(seed_, Purpose::dropout), step_, used_++);
  return static_cast<int64_t>(words[0] | (uint64_t{words[1]} << 32));
}

int64_t LanguageModel::parameter_count() const {
  int64_t count = 0;
  for (const auto& parameter : parameters_) count += parameter.value.numel();
  return count;
}

at::Tensor LanguageModel::logits(const at::Tensor& hidden) const {
  return project(hidden, output_).to(at::kFloat);
}

at::Tensor LanguageModel::mean_loss(const at::Tensor& tokens, const at::Tensor& targets,
                                    DropoutKeys* dropout) const {
  return mean_loss_of(hidden(tokens, nullptr, dropout), output_, targets);
}

at::Tensor LanguageModel::mean_loss(const at::Tensor& tokens, const at::Tensor& targets,
                                    const ops::Sequences& sequences) const {
  return mean_loss_of(packed_hidden(tokens, sequences), output_, targets);
}

at::Tensor LanguageModel::packed_hidden(const at::Tensor&, const ops::Sequences&) const {
  TORCH_CHECK(false, "packed sequences: a ", model_type(config_), " model reads whole rows");
}

at::Tensor LanguageModel::next_logits(const at::Tensor& tokens, StreamState& state) const {
  const auto all = hidden(tokens, &state);  // [B, L, D]
  return logits(all.narrow(1, all.size(1) - 1, 1)).squeeze(1);
}

void LanguageModel::restart(StreamState& state) const {
  const auto fresh = fresh_state(1, 1);
  state.position.copy_(fresh.position);
  for (auto& [name, tensor] : state.tensors) {
    if (!StreamState::is_cache(name)) tensor.copy_(fresh.tensors.at(name));
  }
  state.lowest = state.highest = 0;
}

void LanguageModel::to(at::Device device) {
  for (auto& parameter : parameters_) {
    parameter.value.set_data(parameter.value.to(device));
    if (parameter.rounded && device.is_cuda() && parameter.value.scalar_type() == at::kBFloat16)
      parameter.rounded->gather(parameter.value);
  }
}

void LanguageModel::round_matrices() {
  for (auto& parameter : parameters_) {
    parameter.value.set_requires_grad(false);
    if (parameter.is_matrix) parameter.value.set_data(parameter.value.to(compute_type_));
  }
}

void LanguageModel::keep_rounded() const {
  for (const auto& parameter : parameters_) {
    if (parameter.rounded && parameter.value.scalar_type() != compute_type_)
      parameter.rounded->update(parameter.value, compute_type_);
  }
}

void LanguageModel::set_float8_products(bool in_float8) {
  for (const auto& parameter : parameters_)
    if (parameter.rounded && parameter.is_matrix) parameter.rounded->in_float8 = in_float8;
}

std::unique_ptr<LanguageModel> make_model(const ModelConfig& config, uint64_t seed, bool initialise) {
  if (const auto* megalodon = std::get_if<MegalodonConfig>(&config)) {
    return std::make_unique<Megalodon>(*megalodon, seed, initialise);
  }
  return std::make_unique<Llama>(std::get<LlamaConfig>(config), std::vector{seed}, initialise);
}

std::unique_ptr<LanguageModel> make_stack(const ModelConfig& config, const std::vector<uint64_t>& seeds) {
  if (seeds.size() == 1) return make_model(config, seeds[0]);
  const auto* llama = std::get_if<LlamaConfig>(&config);
  if (llama == nullptr) {
    fail_request("several models at once are not supported for type " + std::string(model_type(config)),
                 "model.type", "use type \"llama\", or one model");
  }
  return std::make_unique<Llama>(*llama, seeds, true);
}

std::unique_ptr<LanguageModel> member(const LanguageModel& stack, int64_t k) {
  auto model = make_model(stack.config(), 0, false);
  model->set_compute_type(stack.compute_type());
  for (std::size_t i = 0; i < stack.parameters().size(); ++i) {
    auto value = model->parameters()[i].value;
    const auto stacked = stack.parameters()[i].value.detach();
    value.set_data(stack.stack() == 1 ? stacked : stacked[k]);
    // A write to either counts for both: what was derived from the stack is known by it to be out of date.
    value.unsafeGetTensorImpl()->set_version_counter(stacked.unsafeGetTensorImpl()->version_counter());
  }
  return model;
}

std::string fingerprint(const ModelConfig& config) {
  auto json = to_json(config);
  for (const char* key :
       {"dropout", "hidden_dropout", "attention_dropout", "initializer_range", "embedding_initializer_range"})
    json.erase(key);
  return hex(xxh3(dump_json(json)));
}

}  // namespace megalodon::model
