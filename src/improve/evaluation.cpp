#include "improve/evaluation.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "improve/learner.h"

namespace megalodon::improve {
namespace {

constexpr std::size_t kShownWrong = 4;

}  // namespace

void check_spells(const data::Tokenizer& tokenizer, const tasks::Task& task, std::string_view where) {
  const auto refuse = [&](const std::string& what) {
    fail_request("its tokenizer has no " + what, where,
                 "name a model that was taught " + std::string(task.name()));
  };
  if (tokenizer.beginning_of_sequence() < 0 || tokenizer.end_of_document() < 0) refuse("begin and end");
  for (const auto& symbol : task.symbols())
    if (tokenizer.decode(tokenizer.encode(symbol)) != symbol) refuse("token for '" + symbol + "'");
}

Reply Solver::reply(std::span<const int32_t> tokens, bool ended, double log_probability) const {
  Reply reply{"", ended, static_cast<int64_t>(tokens.size()) + ended, log_probability};
  for (const int32_t token : tokens) {  // a model may have more tokens than its tokenizer
    const bool known = token < tokenizer_.vocabulary_size();
    const auto text = known ? tokenizer_.decode(std::span(&token, 1)) : "";
    reply.text += text.empty() ? "?" : text;  // what has no place in an answer must show
  }
  return reply;
}

std::vector<std::vector<Reply>> Solver::solve(std::span<const std::string> prompts,
                                              tasks::Difficulty difficulty) {
  std::vector<std::vector<int32_t>> tokens;
  for (const auto& prompt : prompts) tokens.push_back(prompt_tokens(tokenizer_, prompt));
  const generate::GreedyOptions options{
      .end = tokenizer_.end_of_document(), .bound = task_.longest_answer(difficulty) + 1, .batch = batch_};
  const auto answers = decoder_.answer(tokens, options);
  std::vector<std::vector<Reply>> replies(prompts.size());
  for (const auto& of_model : answers) {
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      replies[i].push_back(reply(of_model[i].tokens, of_model[i].ended, of_model[i].mean_log_probability));
    }
  }
  return replies;
}

double Evaluation::mean() const {
  return std::accumulate(accuracy.begin(), accuracy.end(), 0.0) / static_cast<double>(accuracy.size());
}

Evaluation evaluate(Solver& solver, const tasks::Task& task, tasks::Difficulty difficulty, int64_t problems,
                    uint64_t seed) {
  Evaluation result{task.text(difficulty), problems, tasks::is_separable(task, difficulty), {}, {}};
  std::vector<std::string> prompts, targets;
  for (int64_t i = 0; i < problems; ++i) {
    auto problem = tasks::evaluation_problem(task, difficulty, seed, static_cast<uint64_t>(i));
    prompts.push_back(std::move(problem.prompt));
    targets.push_back(std::move(problem.target));
  }
  const auto replies = solver.solve(prompts, difficulty);
  std::vector<int64_t> correct(static_cast<std::size_t>(solver.models()));
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    for (std::size_t m = 0; m < replies[i].size(); ++m) {
      const auto& reply = replies[i][m];
      if (reply.ended && reply.text == targets[i]) {
        ++correct[m];
      } else if (result.wrong.size() < kShownWrong) {
        const auto parted =
            std::mismatch(reply.text.begin(), reply.text.end(), targets[i].begin(), targets[i].end());
        result.wrong.push_back({static_cast<int64_t>(m), prompts[i], targets[i], reply.text, reply.ended,
                                parted.first - reply.text.begin()});
      }
    }
  }
  for (const int64_t count : correct)
    result.accuracy.push_back(static_cast<double>(count) / static_cast<double>(problems));
  return result;
}

Json to_json(const Evaluation& e) {
  Json wrong = Json::array();
  for (const auto& w : e.wrong) {
    wrong.push_back({{"model", w.model + 1},
                     {"prompt", w.prompt},
                     {"target", w.target},
                     {"answer", w.answer},
                     {"ended", w.ended},
                     {"first_wrong", w.first_wrong}});
  }
  Json json{
      {"difficulty", e.difficulty}, {"problems", e.problems}, {"accuracy", e.accuracy}, {"wrong", wrong}};
  if (!e.separable) json["training_may_have_seen_these"] = true;
  return json;
}

Evaluation evaluation_from_json(const Json& json, std::string_view where) {
  Evaluation e;
  e.difficulty = json_member<std::string>(json, "difficulty", where);
  e.problems = json_member<int64_t>(json, "problems", where);
  e.separable = !json_member<bool>(json, "training_may_have_seen_these", where, false);
  const auto damaged = [&](const char* key) {
    fail_request(std::string("no array '") + key + "'", where, "remove the line: it is done again");
  };
  if (!json.contains("accuracy") || !json["accuracy"].is_array() || json["accuracy"].empty())
    damaged("accuracy");
  for (const auto& value : json["accuracy"]) {
    if (!value.is_number()) damaged("accuracy");
    e.accuracy.push_back(value.get<double>());
  }
  if (!json.contains("wrong") || !json["wrong"].is_array()) damaged("wrong");
  for (const auto& w : json["wrong"]) {
    e.wrong.push_back(
        {json_member<int64_t>(w, "model", where) - 1, json_member<std::string>(w, "prompt", where),
         json_member<std::string>(w, "target", where), json_member<std::string>(w, "answer", where),
         json_member<bool>(w, "ended", where), json_member<int64_t>(w, "first_wrong", where)});
  }
  return e;
}

}  // namespace megalodon::improve
