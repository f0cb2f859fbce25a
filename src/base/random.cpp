#include "base/random.h"

#include <cmath>
#include <numbers>

namespace megalodon {

std::array<std::uint32_t, 4> philox(std::uint64_t key, std::uint64_t counter_low,
                                    std::uint64_t counter_high) {
  std::array<std::uint32_t, 4> c{
      static_cast<std::uint32_t>(counter_low), static_cast<std::uint32_t>(counter_low >> 32),
      static_cast<std::uint32_t>(counter_high), static_cast<std::uint32_t>(counter_high >> 32)};
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c[0], b = std::uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

std::uint64_t random_key(std::uint64_t seed, Purpose purpose) {
  const auto words = philox(seed, static_cast<std::uint64_t>(purpose), 0);
  return words[0] | (std::uint64_t{words[1]} << 32);
}

Random::Random(std::uint64_t seed, Purpose purpose, std::uint64_t step)
    : key_(random_key(seed, purpose)), step_(step) {}

std::uint32_t Random::next() {
  if (used_ == words_.size()) {
    words_ = philox(key_, block_++, step_);
    used_ = 0;
  }
  return words_[used_++];
}

double Random::uniform() {
  const std::uint64_t high = next() >> 5, low = next() >> 6;  // 27 and 26 bits
  return static_cast<double>((high << 26) | low) * 0x1p-53;
}

std::uint64_t Random::below(std::uint64_t n) {
  const std::uint64_t limit = n * (UINT64_MAX / n);  // a multiple of n: words beyond it would be biased
  for (;;) {
    const std::uint64_t high = next();
    const std::uint64_t word = (high << 32) | next();
    if (word < limit) return word % n;
  }
}

double Random::normal() {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

}  // namespace megalodon
