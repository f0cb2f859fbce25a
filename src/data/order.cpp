#include "data/order.h"

#include <algorithm>
#include <bit>
#include <string>

#include "base/error.h"
#include "base/random.h"

namespace megalodon::data {

Permutation::Permutation(std::uint64_t n, std::uint64_t key, std::uint64_t tweak)
    : n_(n), key_(key), tweak_(tweak) {
  half_bits_ = std::max(1u, (static_cast<unsigned>(std::bit_width(n - 1)) + 1) / 2);
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  constexpr std::uint64_t kRounds = 6;
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  do {
    std::uint64_t left = index >> half_bits_, right = index & mask;
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      const std::uint64_t mixed = philox(key_, right | round << 32, tweak_)[0] & mask;
      left ^= mixed;
      std::swap(left, right);
    }
    index = left << half_bits_ | right;
  } while (index >= n_);
  return index;
}

WindowOrder::WindowOrder(std::int64_t tokens, std::int64_t context, std::int64_t batch, std::uint64_t seed)
    : context_(context), batch_(batch), seed_(seed), key_(random_key(seed, Purpose::data_order)) {
  if (tokens < context + 1) {
    fail_request(
        "a corpus of " + std::to_string(tokens) + " tokens for a context of " + std::to_string(context),
        "training data", "give more text or a context below " + std::to_string(tokens));
  }
  // A multiple of the context fewer than all, so that the first position has `context` places to be at.
  windows_ = std::max<std::int64_t>(1, (tokens - context) / context);
  offsets_ = std::min(context, tokens - windows_ * context);
}

std::int64_t WindowOrder::position(std::int64_t step, std::int64_t index) const {
  const std::int64_t number = step * batch_ + index;
  const auto epoch = static_cast<std::uint64_t>(number / windows_);
  const std::uint64_t apart = epoch | std::uint64_t{1} << 63;  // from the counters of Random below
  const Permutation permutation(static_cast<std::uint64_t>(windows_), key_, apart);
  const auto window = permutation(static_cast<std::uint64_t>(number % windows_));
  const auto offset = Random(seed_, Purpose::data_order, epoch).below(static_cast<std::uint64_t>(offsets_));
  return static_cast<std::int64_t>(window) * context_ + static_cast<std::int64_t>(offset);
}

std::vector<std::int64_t> WindowOrder::positions(std::int64_t step, std::int64_t rank,
                                                 std::int64_t world) const {
  std::vector<std::int64_t> positions;
  for (std::int64_t index = rank; index < batch_; index += world) positions.push_back(position(step, index));
  return positions;
}

double WindowOrder::epoch(std::int64_t step) const {
  return static_cast<double>(step) * static_cast<double>(batch_) / static_cast<double>(windows_);
}

}  // namespace megalodon::data
