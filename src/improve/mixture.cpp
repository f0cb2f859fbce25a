#include "improve/mixture.h"

#include "base/random.h"
#include "data/order.h"

namespace megalodon::improve {

Mixture::Mixture(const ImproveConfig& config, uint64_t seed)
    : config_(config), seed_(seed), weights_{config.base_weight}, taken_{0} {}

void Mixture::add(std::vector<Example> examples, double weight) {
  weights_.push_back(examples.empty() ? 0 : weight);
  sets_.push_back(std::move(examples));
  taken_.push_back(0);
}

std::size_t Mixture::choose(uint64_t index) const {
  Random random(seed_, Purpose::data_order, index);
  const std::size_t newest = sets_.size();
  const bool has_newest = newest > 0 && !sets_.back().empty();
  if (has_newest && random.uniform() < 0.5) return newest;
  double total = 0;
  for (std::size_t i = 0; i < (has_newest ? newest : newest + 1); ++i) total += weights_[i];
  double place = random.uniform() * total;
  for (std::size_t i = 1; i < (has_newest ? newest : newest + 1); ++i) {
    if (weights_[i] > 0 && place < weights_[i]) return i;
    place -= weights_[i];
  }
  return 0;
}

Example Mixture::draw(uint64_t index) {
  const std::size_t source = choose(index);
  const uint64_t count = taken_[source]++;
  if (source == 0) {
    auto problem = tasks::base_problem(*config_.task, config_.base, config_.equal_share, seed_,
                                       count % config_.base_examples);
    return {std::move(problem.prompt), std::move(problem.target)};
  }
  const auto& set = sets_[source - 1];
  const uint64_t pass = count / set.size();
  const data::Permutation order(set.size(), random_key(seed_, Purpose::data_order), (source << 32) + pass);
  return set[order(count % set.size())];
}

}  // namespace megalodon::improve
