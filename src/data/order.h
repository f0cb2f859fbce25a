#pragma once
#include <cstdint>
#include <vector>

namespace megalodon::data {

// A pseudo-random permutation of 0 .. n-1 in O(1) memory and O(1) expected time an index: a Feistel network
// over the smallest even number of bits that holds n, walked along its cycle until it lands below n (Black &
// Rogaway, 2002). A function of (n, key, tweak) alone.
class Permutation {
 public:
  Permutation(std::uint64_t n, std::uint64_t key, std::uint64_t tweak);  // n >= 1
  std::uint64_t operator()(std::uint64_t index) const;                   // REQUIRES index < n

 private:
  std::uint64_t n_, key_, tweak_;
  unsigned half_bits_;
};

// The order in which training reads windows of context + 1 tokens (inputs and their targets), `context`
// apart, out of a corpus of `tokens`: a function of (seed, step) alone, whatever the number of processes.
// Each epoch reads every window once, in an order of its own; where the windows begin moves from epoch to
// epoch, so that no token is always the first of its window. An epoch leaves out fewer than
// 2 * context tokens at the corpus's ends. Element i of the global batch of a step is number step * batch + i
// of the endless sequence of epochs.
class WindowOrder {
 public:
  // Request error where the corpus has fewer than context + 1 tokens. context, batch >= 1.
  WindowOrder(std::int64_t tokens, std::int64_t context, std::int64_t batch, std::uint64_t seed);

  std::int64_t windows() const { return windows_; }  // of an epoch
  // Where element `index` of the global batch of `step` begins in the corpus.
  std::int64_t position(std::int64_t step, std::int64_t index) const;
  // The positions of process `rank` of `world`: elements rank, rank + world, ... of the global batch.
  std::vector<std::int64_t> positions(std::int64_t step, std::int64_t rank = 0, std::int64_t world = 1) const;
  double epoch(std::int64_t step) const;  // epochs read before `step`

 private:
  std::int64_t context_, batch_, windows_, offsets_;  // offsets_: how many first positions an epoch can have
  std::uint64_t seed_, key_;
};

}  // namespace megalodon::data
