#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "generate/stepper.h"
#include "model/language_model.h"

namespace megalodon::generate {

// A greedy answer to one prompt.
struct Answer {
  std::vector<std::int32_t> tokens;  // without the end token
  bool ended = false;                // the end token came within the bound
  double mean_log_probability = 0;   // of its tokens, the end token included; nats
};

struct GreedyOptions {
  std::int32_t end = 0;      // the token that ends an answer
  std::int64_t bound = 0;    // most tokens of an answer, the end token included
  std::int64_t batch = 512;  // sequences at once, of each model
};

// Answers of every model of a stack (one for ordinary models) to every prompt: answers[m][i]. Prompts of
// equal length are decoded side by side with cached states; a finished sequence stops costing. The answers
// are a function of the arguments alone. No prompt may be empty.
class GreedyDecoder {
 public:
  explicit GreedyDecoder(const model::LanguageModel& model) : model_(model), stepper_(model) {}
  std::vector<std::vector<Answer>> answer(std::span<const std::vector<std::int32_t>> prompts,
                                          const GreedyOptions& options);

 private:
  const model::LanguageModel& model_;
  Stepper stepper_;  // of whole batches: what it recorded for one serves the next
};

}  // namespace megalodon::generate
