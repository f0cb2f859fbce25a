#include "generate/session.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/error.h"

namespace megalodon::generate {
namespace {

const char kLastLogits[] = "last_logits";  // [1, V] float32

// A file's tensors must be those of the model: as many, of the same names, types and shapes (the baseline's
// caches may be longer).
void check_fits(const model::LanguageModel& model, const model::StreamState& state,
                const std::string& where) {
  const auto refuse = [&](const std::string& why) {
    fail_request("the state does not fit the model: " + why, where, "use the model that wrote it");
  };
  if (state.model != model::fingerprint(model.config())) refuse("it was written by another model");
  if (state.batch() != 1 || state.lowest < 0) refuse("it is not one stream");
  const auto fresh = model.fresh_state(1);
  const bool grows = model::model_type(model.config()) == "llama";
  for (const auto& [name, expected] : fresh.tensors) {
    const auto found = state.tensors.find(name);
    if (found == state.tensors.end()) refuse("no tensor '" + name + "'");
    auto shape = found->second.sizes().vec();
    if (grows && shape.size() == 4) {
      if (shape[1] < state.highest) refuse("'" + name + "' is too short");
      shape[1] = expected.size(1);
    }
    if (shape != expected.sizes() || found->second.scalar_type() != expected.scalar_type()) {
      refuse("tensor '" + name + "' has another shape or type");
    }
  }
}

}  // namespace

Session::Session(const model::LanguageModel& model, model::StreamOptions options)
    : model_(model), options_(options), state_(model.fresh_state(1)), stepper_(model) {}

Session::Session(const model::LanguageModel& model, const std::filesystem::path& state,
                 model::StreamOptions options)
    : model_(model),
      options_(options),
      state_(model::StreamState::load(state).to(model.device())),
      stepper_(model) {
  check_fits(model, state_, state.string());
  if (const auto logits = state_.tensors.extract(kLastLogits)) {
    last_logits_ = logits.mapped().view(-1);
    if (last_logits_.numel() != model::vocab_size(model.config()) ||
        last_logits_.scalar_type() != at::kFloat) {
      fail_request("the state does not fit the model: its logits have another size", state.string(),
                   "use the model that wrote it");
    }
  }
}

void Session::read(std::span<const int32_t> tokens) {
  if (tokens.empty()) return;
  if (tokens.size() == 1 && !options_.truncate_statistics) {
    const auto token = model::tokens_tensor(tokens).view(-1).to(model_.device());
    last_logits_ = stepper_.step(token, state_).view(-1);
    return;
  }
  at::Tensor last;
  model::stream(model_, model::tokens_tensor(tokens), state_, options_,
                [&](int64_t, const at::Tensor& hidden) {
                  last = hidden.select(1, hidden.size(1) - 1);  // [1, D]
                });
  const at::NoGradGuard no_grad;
  last_logits_ = model_.logits(last).view(-1);
}

int64_t Session::draw(const SamplingOptions& options) {
  if (empty())
    fail_request("nothing to continue", "generate", "give a prompt of at least one token or a state");
  const int64_t token = sample(last_logits_, options, static_cast<uint64_t>(position()));
  const auto id = static_cast<int32_t>(token);
  read({&id, 1});
  return token;
}

void Session::save(const std::filesystem::path& path) const {
  auto state = state_;
  if (!empty()) state.tensors[kLastLogits] = last_logits_.view({1, -1});
  state.save(path);
}

}  // namespace megalodon::generate
