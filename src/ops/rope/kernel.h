#pragma once
#include <cstdint>
#include <vector>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

// The rotations of the tokens of one call: for token (b, t), d cosines and d sines, each pair's angle twice,
// the first sine of a pair negated, so that (a, b) -> (a, b) cos + (b, a) sin. Angles in float64. Holds each
// position that occurs once where the rows of the batch lie close together, else each token.
class Rotations {
 public:
  // start [B]; chunk 0: no modulus.
  Rotations(const std::int64_t* start, std::int64_t B, std::int64_t L, std::int64_t chunk, double base,
            std::int64_t d);

  const float* of(std::int64_t b, std::int64_t t) const {
    return values_.data() + 2 * d_ * (shared_ ? position(b, t) - lowest_ : b * L_ + t);
  }

 private:
  std::int64_t position(std::int64_t b, std::int64_t t) const {
    const std::int64_t p = first_[static_cast<std::size_t>(b)] + t;
    return chunk_ > 0 ? p % chunk_ : p;
  }
  // The rows from `row` on are those of `count` positions from `position` on.
  void fill(std::int64_t row, std::int64_t position, std::int64_t count);

  std::int64_t L_, chunk_, d_, lowest_ = 0;
  bool shared_ = false;
  std::vector<std::int64_t> first_;  // position of each row's first token
  std::vector<double> frequency_;    // [d/2]
  std::vector<float> values_;
};

// x, y [B, L, H, d].
template <class T>
void rope(const T* x, const Rotations& rotations, bool inverse, std::int64_t B, std::int64_t L,
          std::int64_t H, std::int64_t d, T* y);

}  // namespace megalodon::ops::cpu
