#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <span>

#include "generate/sampling.h"
#include "generate/stepper.h"
#include "model/language_model.h"
#include "model/streaming.h"

namespace megalodon::generate {

// One stream of tokens through a model: reads any number of them, continues them, and can be put down in a
// file and taken up elsewhere. Memory does not grow with what was read (Megalodon).
class Session {
 public:
  explicit Session(const model::LanguageModel& model, model::StreamOptions options = {});
  // Goes on from a file that save() wrote; a request error where it belongs to another model.
  Session(const model::LanguageModel& model, const std::filesystem::path& state,
          model::StreamOptions options = {});

  void read(std::span<const int32_t> tokens);
  // The next token after all that was read or drawn; at least one token must have been read.
  int64_t draw(const SamplingOptions& options);
  int64_t position() const { return state_.highest; }
  bool empty() const { return !last_logits_.defined(); }
  void save(const std::filesystem::path& path) const;

 private:
  const model::LanguageModel& model_;
  model::StreamOptions options_;
  model::StreamState state_;
  Stepper stepper_;
  at::Tensor last_logits_;  // [V] float32, undefined before the first token
};

}  // namespace megalodon::generate
