#pragma once
#include <cstdint>

#include "base/random.h"

namespace megalodon::ops {

// The random word of a softmax weight: a function of the key, the head of the batch (b H + h), the query's
// position and the index of the key among those that the query may see, whatever the call it happens in.
// Keys are taken 64 at a time: word w of counter 16 g + i belongs to key 64 g + 16 w + i, so that a vector of
// counters gives the words of neighbouring keys.
inline std::uint32_t dropout_word(std::uint64_t key, std::int64_t head, std::int64_t position,
                                  std::int64_t index) {
  const auto i = static_cast<std::uint64_t>(index);
  const auto words = philox(key, static_cast<std::uint64_t>(position),
                            (static_cast<std::uint64_t>(head) << 32) | (i / 64 * 16 + i % 16));
  return words[i / 16 % 4];
}

}  // namespace megalodon::ops
