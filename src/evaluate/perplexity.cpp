#include "evaluate/perplexity.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/error.h"
#include "base/system.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::evaluate {
namespace {

// The summed loss of the tokens from `first_target` on, each predicted from all before it. A token's
// predecessor must be read.
double read_and_score(const model::LanguageModel& model, const at::Tensor& tokens, int64_t first_target,
                      model::StreamState& state, const model::StreamOptions& options) {
  const int64_t L = tokens.size(1);
  const auto inputs = tokens.narrow(1, 0, L - 1), next = tokens.narrow(1, 1, L - 1).to(model.device());
  double sum = 0;
  model::stream(model, inputs, state, options, [&](int64_t offset, const at::Tensor& hidden) {
    const int64_t skip = std::clamp<int64_t>(first_target - 1 - offset, 0, hidden.size(1));
    const int64_t scored = hidden.size(1) - skip;
    if (scored == 0) return;
    const auto logits = model.logits(hidden.narrow(1, skip, scored));
    const auto nll =
        ops::cross_entropy(logits.reshape({scored, -1}), next.narrow(1, offset + skip, scored).reshape(-1));
    sum += nll.sum(at::kDouble).item<double>();
  });
  return sum;
}

}  // namespace

std::vector<PerplexityResult> perplexity_by_context(
    const model::LanguageModel& model, std::span<const int32_t> tokens, const PerplexityOptions& options,
    const std::function<void(const PerplexityResult&)>& report) {
  const auto [smallest, largest] = std::minmax_element(options.contexts.begin(), options.contexts.end());
  const auto available = static_cast<int64_t>(tokens.size());
  if (options.contexts.empty() || *smallest < 2) {
    fail_request("context lengths", "evaluation", "give at least one, each at least 2 tokens");
  }
  if (*largest > available) {
    fail_request("the data has " + std::to_string(available) + " tokens, fewer than the largest context of " +
                     std::to_string(*largest),
                 "evaluation", "give more data or a smaller context");
  }
  const int64_t targets = std::min(options.targets > 0 ? options.targets : *smallest, *smallest - 1);
  const int64_t windows = std::clamp<int64_t>(options.windows, 1, available / *largest);
  std::vector<PerplexityResult> results;
  for (const int64_t context : options.contexts) {
    PerplexityResult result{context, windows * targets, 0, 0, {}};
    const double started = monotonic_seconds();
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t end = *largest + (windows > 1 ? (available - *largest) * w / (windows - 1) : 0);
      const auto window =
          tokens.subspan(static_cast<std::size_t>(end - context), static_cast<std::size_t>(context));
      auto state = model.fresh_state(1);
      result.loss +=
          read_and_score(model, model::tokens_tensor(window), context - targets, state, options.stream);
      const auto scored = window.last(static_cast<std::size_t>(targets));
      result.targets.insert(result.targets.end(), scored.begin(), scored.end());
    }
    result.loss /= static_cast<double>(result.tokens);
    result.seconds = monotonic_seconds() - started;
    report(result);
    results.push_back(std::move(result));
  }
  return results;
}

void stream_document(const model::LanguageModel& model, std::span<const int32_t> tokens, int64_t interval,
                     const model::StreamOptions& options,
                     const std::function<void(const StreamPoint&)>& report) {
  auto state = model.fresh_state(1);
  const auto available = static_cast<int64_t>(tokens.size()) - 1;
  for (int64_t position = 0; position < available;) {
    const int64_t length = std::min(interval, available - position);
    const double started = monotonic_seconds();
    const auto part =
        tokens.subspan(static_cast<std::size_t>(position), static_cast<std::size_t>(length + 1));
    const double loss = read_and_score(model, model::tokens_tensor(part), 1, state, options);
    position += length;
    report({position, loss / static_cast<double>(length),
            (monotonic_seconds() - started) / static_cast<double>(length), resident_bytes()});
  }
}

}  // namespace megalodon::evaluate
