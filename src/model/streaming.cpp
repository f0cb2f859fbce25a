#include "model/streaming.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <bit>

#include "base/error.h"

namespace megalodon::model {
namespace {

constexpr int64_t kStatisticsChunks = 6;  // chunks of the fresh pass
constexpr int64_t kTruncationStart = 8;   // chunks read before the first
const char kRecent[] = "recent_tokens";   // [B, up to 6c] int64: the tokens before the position

void remember(StreamState& state, const at::Tensor& tokens, int64_t window) {
  auto& recent = state.tensors.try_emplace(kRecent, tokens.narrow(1, 0, 0)).first->second;
  const auto all = at::cat({recent, tokens}, 1);
  recent = all.narrow(1, std::max<int64_t>(all.size(1) - window, 0), std::min(all.size(1), window)).clone();
}

void truncate_statistics(const LanguageModel& model, StreamState& state) {
  auto fresh = model.fresh_state(state.batch());
  model.hidden(state.tensors.at(kRecent), &fresh);
  for (auto& [name, tensor] : state.tensors) {
    if (name.find("norm_") != std::string::npos) tensor = fresh.tensors.at(name);
  }
}

// A whole piece, or a power of two: matrix libraries keep a kernel for every shape they meet, and memory must
// not grow.
int64_t call_length(int64_t available, int64_t piece) {
  return available == piece ? piece : static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(available)));
}

}  // namespace

at::Tensor tokens_tensor(std::span<const int32_t> ids) {
  auto* data = const_cast<int32_t*>(ids.data());
  return at::from_blob(data, {1, static_cast<int64_t>(ids.size())}, at::kInt).to(at::kLong);
}

void stream(const LanguageModel& model, const at::Tensor& tokens, StreamState& state,
            const StreamOptions& options, const std::function<void(int64_t, const at::Tensor&)>& visit) {
  const at::NoGradGuard no_grad;
  const auto* megalodon = std::get_if<MegalodonConfig>(&model.config());
  const bool truncating = options.truncate_statistics;
  if (truncating && megalodon == nullptr) {
    fail_request("truncated statistics", "a Llama-style model",
                 "it has no norm statistics; leave the option out");
  }
  const int64_t c = megalodon != nullptr ? megalodon->chunk_size : 1024;
  const int64_t piece = options.piece > 0 && !truncating ? options.piece : 2 * c;
  const int64_t L = tokens.size(1);
  TORCH_CHECK(state.common_position(), "stream: streams at one position expected");
  for (int64_t offset = 0; offset < L;) {
    const int64_t position = *state.common_position();
    const int64_t length = call_length(std::min(L - offset, piece - position % piece), piece);
    const auto part = tokens.narrow(1, offset, length).to(model.device());
    visit(offset, model.hidden(part, &state));
    offset += length;
    if (!truncating) continue;
    remember(state, part, kStatisticsChunks * c);
    const int64_t end = position + length;
    if (offset < L && end % piece == 0 && end >= kTruncationStart * c) truncate_statistics(model, state);
  }
}

}  // namespace megalodon::model
