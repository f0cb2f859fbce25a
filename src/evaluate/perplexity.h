#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "model/language_model.h"
#include "model/streaming.h"

namespace megalodon::evaluate {

struct PerplexityOptions {
  std::vector<int64_t> contexts = {};  // ascending; tokens visible to the last target, itself included
  int64_t targets = 0;                 // scored tokens a window; 0: the smallest context, at most
  int64_t windows = 8;                 // windows spread evenly over the tokens
  model::StreamOptions stream = {};
};

struct PerplexityResult {
  int64_t context;
  int64_t tokens;  // scored, the same ones at every context
  double loss;     // nats a token
  double seconds;
  std::vector<int32_t> targets;  // the scored ids, for bits per byte
};

// Loss by context length. Windows of the largest context lie evenly over `tokens`; at context n a window's
// last n tokens are read from a fresh state and the same last targets are scored. Request error where
// `tokens` are fewer than the largest context.
std::vector<PerplexityResult> perplexity_by_context(
    const model::LanguageModel& model, std::span<const int32_t> tokens, const PerplexityOptions& options,
    const std::function<void(const PerplexityResult&)>& report);

struct StreamPoint {
  int64_t position;          // tokens read so far
  double loss;               // nats a token since the last point
  double seconds_per_token;  // since the last point
  int64_t resident_bytes;    // of the process
};

// One document read from first token to last at constant memory; a point every `interval` tokens.
void stream_document(const model::LanguageModel& model, std::span<const int32_t> tokens, int64_t interval,
                     const model::StreamOptions& options,
                     const std::function<void(const StreamPoint&)>& report);

}  // namespace megalodon::evaluate
