#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/tokenizer.h"
#include "generate/greedy.h"
#include "improve/filters.h"
#include "model/language_model.h"

namespace megalodon::improve {

// A request error where the tokenizer cannot spell the task's problems, or has no ends of prompts and
// answers.
void check_spells(const data::Tokenizer& tokenizer, const tasks::Task& task, std::string_view where);

// Greedy answers of all models of a run.
class Solver {
 public:
  // `batch`: sequences at once, of each model.
  Solver(const model::LanguageModel& models, const data::Tokenizer& tokenizer, const tasks::Task& task,
         int64_t batch)
      : models_(models), decoder_(models), tokenizer_(tokenizer), task_(task), batch_(batch) {}

  int64_t models() const { return models_.stack(); }
  int64_t batch() const { return batch_; }
  // replies[i][m] of model m to prompt i. Decoding stops at the longest true answer of the difficulty and its
  // end; the answers themselves are not asked for.
  std::vector<std::vector<Reply>> solve(std::span<const std::string> prompts, tasks::Difficulty difficulty);

 private:
  Reply reply(std::span<const int32_t> tokens, bool ended, double log_probability) const;

  const model::LanguageModel& models_;
  generate::GreedyDecoder decoder_;
  const data::Tokenizer& tokenizer_;
  const tasks::Task& task_;
  int64_t batch_;
};

struct WrongAnswer {
  int64_t model;
  std::string prompt, target, answer;
  bool ended;
  int64_t first_wrong;  // the byte where answer and target part
};

// Exact match, the end token included, on problems that no training set holds.
struct Evaluation {
  std::string difficulty;
  int64_t problems = 0;
  bool separable = true;  // false: the difficulty has so few problems that training may have seen these
  std::vector<double> accuracy;    // of each model
  std::vector<WrongAnswer> wrong;  // the first few

  double mean() const;
};

Evaluation evaluate(Solver& solver, const tasks::Task& task, tasks::Difficulty difficulty, int64_t problems,
                    uint64_t seed);

Json to_json(const Evaluation& evaluation);
Evaluation evaluation_from_json(const Json& json, std::string_view where);

}  // namespace megalodon::improve
