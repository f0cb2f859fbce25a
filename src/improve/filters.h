#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "improve/config.h"

namespace megalodon::improve {

// What a model answered to a prompt.
struct Reply {
  std::string text;
  bool ended = false;          // the end token came
  int64_t tokens = 0;          // the end token included
  double log_probability = 0;  // mean over the tokens
  bool same_answer(const Reply& other) const { return ended == other.ended && text == other.text; }
};

// A self-made problem on its way to the training set. There is no true answer here: a filter cannot look.
struct Candidate {
  int64_t model = 0;       // whose problem it is
  int64_t difficulty = 0;  // among those of the round
  std::string prompt;
  std::vector<Reply> replies;  // of every model
  std::size_t label = 0;       // the reply that becomes the label: at first the model's own
  bool kept = true;

  const Reply& answer() const { return replies[label]; }
};

// Decides on candidates from what the models said (arXiv 2502.01612, section 4). Candidates that are not kept
// any more are left alone.
class Filter {
 public:
  virtual ~Filter() = default;
  virtual std::string_view name() const = 0;
  virtual void apply(std::span<Candidate> candidates) const = 0;
};

inline constexpr std::array<std::string_view, 4> kFilters{"vote", "length", "confidence", "verifier"};

// Keeps the most common reply, whole rows compared, where at least `share` of the models gave it; it becomes
// the label.
std::unique_ptr<Filter> make_vote_filter(double share);
// Among the answers to one model's problems of one difficulty, with L tokens in the longest: drops those of
// L - slack tokens or fewer.
std::unique_ptr<Filter> make_length_filter(int64_t slack);
// Keeps that share of the answers to one model's problems of one difficulty whose mean log-probability is
// highest; the earlier of equals.
std::unique_ptr<Filter> make_confidence_filter(double share);
// Keeps answers that the task verifies from the prompt alone.
std::unique_ptr<Filter> make_verifier_filter(const tasks::Task& task, bool steps, bool ends);

// The configured chain, in order.
std::vector<std::unique_ptr<Filter>> make_filters(const ImproveConfig& config);

}  // namespace megalodon::improve
