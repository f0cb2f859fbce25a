#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "improve/config.h"

namespace megalodon::improve {

// A prompt and what is learnt as its answer.
struct Example {
  std::string prompt, label;
  bool ended = true;  // the end token belongs to the label
};

// What one model trains on in a round (arXiv 2502.01612, section 3): each example comes with probability 1/2
// from the newest self-made set, otherwise from the labelled set or an older self-made set by weight. Every
// set is read in a shuffled order without replacement, and again when it is exhausted. Empty sets are passed
// over.
class Mixture {
 public:
  // `seed` is the model's own.
  Mixture(const ImproveConfig& config, uint64_t seed);

  // The self-made set of the next round; `weight` counts once it is not the newest.
  void add(std::vector<Example> examples, double weight);

  // The example `index` of the whole run. To be called in order: it moves the places of the sets on.
  Example draw(uint64_t index);

  // Examples taken from each set: the labelled one, then the self-made ones. What a checkpoint keeps.
  const std::vector<uint64_t>& taken() const { return taken_; }
  void set_taken(std::vector<uint64_t> taken) { taken_ = std::move(taken); }

 private:
  std::size_t choose(uint64_t index) const;

  const ImproveConfig& config_;
  uint64_t seed_;
  std::vector<std::vector<Example>> sets_;  // self-made
  std::vector<double> weights_;             // of the labelled set and the self-made ones
  std::vector<uint64_t> taken_;
};

}  // namespace megalodon::improve
