#include "improve/filters.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace megalodon::improve {
namespace {

class Vote : public Filter {
 public:
  explicit Vote(double share) : share_(share) {}
  std::string_view name() const override { return "vote"; }
  void apply(std::span<Candidate> candidates) const override {
    for (auto& c : candidates) {
      if (!c.kept) continue;
      std::size_t most = 0;
      for (std::size_t i = 0; i < c.replies.size(); ++i) {
        const auto votes = static_cast<std::size_t>(
            std::count_if(c.replies.begin(), c.replies.end(),
                          [&](const Reply& reply) { return reply.same_answer(c.replies[i]); }));
        if (votes > most) {
          most = votes;
          c.label = i;
        }
      }
      // A share of 0.6 of five models is three, whatever 0.6 * 5 rounds to.
      c.kept = static_cast<double>(most) >= share_ * static_cast<double>(c.replies.size()) - 1e-9;
    }
  }

 private:
  double share_;
};

// The kept candidates of each model and difficulty.
std::map<std::pair<int64_t, int64_t>, std::vector<Candidate*>> groups_of(std::span<Candidate> candidates) {
  std::map<std::pair<int64_t, int64_t>, std::vector<Candidate*>> groups;
  for (auto& c : candidates) {
    if (c.kept) groups[{c.model, c.difficulty}].push_back(&c);
  }
  return groups;
}

class Length : public Filter {
 public:
  explicit Length(int64_t slack) : slack_(slack) {}
  std::string_view name() const override { return "length"; }
  void apply(std::span<Candidate> candidates) const override {
    for (const auto& [key, group] : groups_of(candidates)) {
      int64_t longest = 0;
      for (const auto* c : group) longest = std::max(longest, c->answer().tokens);
      for (auto* c : group) c->kept = c->answer().tokens > longest - slack_;
    }
  }

 private:
  int64_t slack_;
};

class Confidence : public Filter {
 public:
  explicit Confidence(double share) : share_(share) {}
  std::string_view name() const override { return "confidence"; }
  void apply(std::span<Candidate> candidates) const override {
    for (auto& [key, group] : groups_of(candidates)) {
      auto surest_first = group;
      std::sort(surest_first.begin(), surest_first.end(), [](const Candidate* a, const Candidate* b) {
        return std::pair(-a->answer().log_probability, a) < std::pair(-b->answer().log_probability, b);
      });
      const auto kept = static_cast<std::size_t>(std::llround(share_ * static_cast<double>(group.size())));
      for (std::size_t i = kept; i < surest_first.size(); ++i) surest_first[i]->kept = false;
    }
  }

 private:
  double share_;
};

class Verifier : public Filter {
 public:
  Verifier(const tasks::Task& task, bool steps, bool ends) : task_(task), steps_(steps), ends_(ends) {}
  std::string_view name() const override { return "verifier"; }
  void apply(std::span<Candidate> candidates) const override {
    for (auto& c : candidates) {
      if (c.kept) c.kept = task_.verify(c.prompt, c.answer().text, steps_, ends_);
    }
  }

 private:
  const tasks::Task& task_;
  bool steps_, ends_;
};

}  // namespace

std::unique_ptr<Filter> make_vote_filter(double share) {
  return std::make_unique<Vote>(share);
}
std::unique_ptr<Filter> make_length_filter(int64_t slack) {
  return std::make_unique<Length>(slack);
}
std::unique_ptr<Filter> make_confidence_filter(double share) {
  return std::make_unique<Confidence>(share);
}
std::unique_ptr<Filter> make_verifier_filter(const tasks::Task& task, bool steps, bool ends) {
  return std::make_unique<Verifier>(task, steps, ends);
}

std::vector<std::unique_ptr<Filter>> make_filters(const ImproveConfig& config) {
  std::vector<std::unique_ptr<Filter>> chain;
  for (const auto& name : config.filters) {
    if (name == "vote") chain.push_back(make_vote_filter(config.vote_share));
    if (name == "length") chain.push_back(make_length_filter(config.length_slack));
    if (name == "confidence") chain.push_back(make_confidence_filter(config.confidence_share));
    if (name == "verifier")
      chain.push_back(make_verifier_filter(*config.task, config.verify_steps, config.verify_ends));
  }
  return chain;
}

}  // namespace megalodon::improve
