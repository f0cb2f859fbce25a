#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "improve/evaluation.h"
#include "improve/learner.h"
#include "improve/mixture.h"
#include "improve/round_files.h"
#include "train/checkpoint.h"

namespace megalodon::improve {

struct StepMetrics {
  int64_t round, step;  // steps of the whole run, this one included
  int64_t tokens;       // of this step
  double loss, learning_rate, gradient_norm, seconds;
  bool skipped;
};

// Who is told of a run. Steps of work that was done before a kill are not told again; evaluations, labels and
// ends of rounds at the step where the run went on are.
class Listener {
 public:
  virtual ~Listener() = default;
  virtual void on_start(const Json& /*facts*/) {}
  virtual void on_step(const StepMetrics&) {}
  virtual void on_labels(int64_t /*round*/, int64_t /*step*/, const LabelReport&) {}
  virtual void on_evaluation(int64_t /*round*/, int64_t /*step*/, const Evaluation&) {}
  // The hardest difficulty solved ("" for none), and the seconds of each phase.
  virtual void on_round(int64_t /*round*/, int64_t /*step*/, const std::string& /*solved*/,
                        const std::map<std::string, double>& /*seconds*/) {}
  // Progress within what is not a training step.
  virtual void on_progress(int64_t /*round*/, const std::string& /*phase*/, int64_t /*done*/,
                           int64_t /*total*/) {}
};

// Each model's own: of its initial weights, its labelled and its self-made problems.
std::vector<uint64_t> model_seeds(const ImproveConfig& config);

// A difficulty is solved from this accuracy on.
inline constexpr double kSolved = 0.99;

// Self-improvement (arXiv 2502.01612): round 0 learns labelled problems; each later round answers unlabelled
// problems that are a little harder, filters the answers without labels, and learns on. Data, weights and
// evaluations are functions of the configuration alone; a process killed anywhere goes on to the same files.
class Improvement {
 public:
  // The true answer of a self-made problem. Only labels.json is made with it.
  using Truth = std::function<std::string(const std::string& prompt)>;

  Improvement(const ImproveConfig& config, model::LanguageModel& models, const data::Tokenizer& tokenizer,
              Truth truth);

  // Continues from the newest whole checkpoint; the step it stands at, 0 where there is none.
  int64_t resume();
  // Runs to the end of the last round, or to the interruption of the process: true where it was reached.
  bool run(const std::vector<Listener*>& listeners);

 private:
  bool train();
  bool evaluate();
  bool plan(const RoundFiles& files);
  bool probe(const RoundFiles& files, Plan& plan);
  bool generate(const RoundFiles& files);
  void filter(const RoundFiles& files);
  void begin_round(const RoundFiles& files);
  void save() const;
  train::Batch next_batch();
  RoundFiles files(int64_t round) const { return {config_.run, round, *config_.task}; }
  // The evaluation of `difficulty` that is line `line` of the file, done now where the file ends before.
  Evaluation evaluation_in(const std::filesystem::path& path, std::size_t line, tasks::Difficulty difficulty,
                           int64_t problems, uint64_t seed, const RoundFiles& files,
                           const std::string& phase);
  template <class Tell>
  void tell(const Tell& tell_one) const {
    for (auto* listener : listeners_) tell_one(*listener);
  }

  const ImproveConfig& config_;
  model::LanguageModel& models_;
  const data::Tokenizer& tokenizer_;
  Truth truth_;
  const std::vector<uint64_t> seeds_;
  Learner learner_;
  Solver solver_;
  train::CheckpointFolder checkpoints_;
  std::vector<Mixture> mixtures_;  // of each model
  std::vector<Listener*> listeners_;
  int64_t round_ = 0, round_step_ = 0;  // steps done in this round
  int64_t step_ = 0;                    // steps done in all
  int64_t reach_ = 0;                   // rungs above the base that are trained on
  int64_t skipped_in_row_ = 0;
};

}  // namespace megalodon::improve
