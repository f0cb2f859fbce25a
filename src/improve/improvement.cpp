#include "improve/improvement.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/random.h"
#include "base/signals.h"
#include "base/system.h"

namespace megalodon::improve {
namespace {
namespace fs = std::filesystem;

constexpr int64_t kMostSkipped = 10;

// The problems of one model and difficulty that are answered together.
struct Chunk {
  int64_t model, difficulty, begin, end;
};

std::vector<Chunk> chunks_of(const ImproveConfig& config, std::size_t difficulties) {
  std::vector<Chunk> chunks;
  const auto count = static_cast<int64_t>(difficulties);
  for (int64_t model = 0; model < config.models; ++model) {
    for (int64_t d = 0; d < count; ++d) {
      // Shared out evenly, the first difficulties get the rest.
      const int64_t problems =
          config.per_difficulty ? config.problems : config.problems / count + (d < config.problems % count);
      for (int64_t begin = 0; begin < problems; begin += config.generation_batch)
        chunks.push_back({model, d, begin, std::min(problems, begin + config.generation_batch)});
    }
  }
  return chunks;
}

}  // namespace

std::vector<uint64_t> model_seeds(const ImproveConfig& config) {
  std::vector<uint64_t> seeds;
  for (int64_t k = 0; k < config.models; ++k) seeds.push_back((config.seed << 8) + static_cast<uint64_t>(k));
  return seeds;
}

Improvement::Improvement(const ImproveConfig& config, model::LanguageModel& models,
                         const data::Tokenizer& tokenizer, Truth truth)
    : config_(config),
      models_(models),
      tokenizer_(tokenizer),
      truth_(std::move(truth)),
      seeds_(model_seeds(config)),
      learner_(models, config.optimizer),
      solver_(models, tokenizer, *config.task, config.generation_batch),
      checkpoints_(config.run / "checkpoints", config.checkpoint_keep) {
  models_.set_compute_type(config.compute_type == "bfloat16" ? at::kBFloat16 : at::kFloat);
  for (const auto seed : seeds_) mixtures_.emplace_back(config, seed);
}

int64_t Improvement::resume() {
  const auto found = checkpoints_.latest();
  if (!found) return 0;
  const auto path = found->folder / "improve.json";
  const auto state = parse_json(read_file(path), path.string());
  const auto type = json_member<std::string>(state, "compute_type", path.string());
  if (type != config_.compute_type) {
    fail_request("the run computes in " + type + ", this machine would in " + config_.compute_type,
                 path.string(), "set train.compute_type to \"" + type + "\" by --set");
  }
  learner_.load(found->folder);
  const int64_t round = json_member<int64_t>(state, "round", path.string());
  for (int64_t r = 1; r <= round; ++r) {
    round_ = r;
    begin_round(files(r));
  }
  round_step_ = json_member<int64_t>(state, "round_step", path.string());
  step_ = json_member<int64_t>(state, "step", path.string());
  skipped_in_row_ = json_member<int64_t>(state, "skipped_in_row", path.string());
  const auto& taken = state["taken"];
  if (!taken.is_array() || taken.size() != mixtures_.size())
    fail_request("'taken' does not fit the models", path.string(), "the checkpoint is another run's");
  for (std::size_t k = 0; k < mixtures_.size(); ++k) {
    const auto counts = taken[k].get<std::vector<uint64_t>>();
    if (counts.size() != mixtures_[k].taken().size())
      fail_request("'taken' does not fit the rounds", path.string(), "the checkpoint is another run's");
    mixtures_[k].set_taken(counts);
  }
  return step_;
}

void Improvement::save() const {
  checkpoints_.save(step_, [&](const fs::path& folder) {
    learner_.save(tokenizer_, folder);
    Json taken = Json::array();
    for (const auto& mixture : mixtures_) taken.push_back(mixture.taken());
    const Json state{{"round", round_},
                     {"round_step", round_step_},
                     {"step", step_},
                     {"skipped_in_row", skipped_in_row_},
                     {"compute_type", config_.compute_type},
                     {"taken", taken}};
    write_file_atomically(folder / "improve.json", state.dump(2) + "\n");
  });
}

bool Improvement::run(const std::vector<Listener*>& listeners) {
  listeners_ = listeners;
  for (;;) {
    if (!train() || !evaluate()) return false;
    if (round_ == config_.rounds) return true;
    const auto next = files(round_ + 1);
    if (!plan(next) || !generate(next)) return false;
    filter(next);
    ++round_;
    begin_round(next);
    round_step_ = 0;
  }
}

train::Batch Improvement::next_batch() {
  std::vector<Example> examples;
  for (auto& mixture : mixtures_) {
    for (int64_t i = 0; i < config_.batch; ++i)
      examples.push_back(mixture.draw(static_cast<uint64_t>(step_ * config_.batch + i)));
  }
  return learner_.batch(tokenizer_, examples);
}

bool Improvement::train() {
  const auto& stage = config_.stage(round_);
  const auto round_files = files(round_);
  double unsaved_seconds = 0;
  bool saved = true;
  const auto keep = [&] {
    round_files.add_time("train", unsaved_seconds);
    unsaved_seconds = 0;
    save();
    saved = true;
  };
  std::optional<train::Batch> drawn;  // of the step to come; a checkpoint knows of none
  while (round_step_ < stage.steps() && (drawn || !interrupted())) {
    const double started = monotonic_seconds(), rate = stage.rate(round_step_);
    learner_.start(drawn ? *drawn : next_batch(), rate);
    drawn.reset();
    ++round_step_;
    ++step_;
    const bool due = config_.checkpoint_every > 0 && step_ % config_.checkpoint_every == 0;
    const bool keeps = due || round_step_ == stage.steps();
    if (!keeps && !interrupted()) drawn = next_batch();
    const auto outcome = learner_.finish();
    const double seconds = monotonic_seconds() - started;
    unsaved_seconds += seconds;
    saved = false;
    tell([&](Listener& listener) {
      listener.on_step({round_, step_, outcome.tokens, outcome.loss, rate, outcome.gradient_norm, seconds,
                        outcome.skipped});
    });
    skipped_in_row_ = outcome.skipped ? skipped_in_row_ + 1 : 0;
    if (outcome.skipped) {
      log_warning("step " + std::to_string(step_) + " skipped: its loss or gradient is not finite");
      if (skipped_in_row_ == kMostSkipped) {
        fail_work(std::to_string(kMostSkipped) + " steps in a row were not finite",
                  "step " + std::to_string(step_),
                  "lower the learning rate; the last good checkpoint is kept");
      }
    }
    if (keeps) keep();
  }
  if (!saved) keep();
  if (round_step_ < stage.steps()) return false;
  if (config_.keep_models && !fs::exists(round_files.folder() / "model")) {
    const auto aside = round_files.folder() / ".model";
    fs::remove_all(aside);
    save_members(models_, tokenizer_, aside);
    rename_durably(aside, round_files.folder() / "model");
  }
  return true;
}

Evaluation Improvement::evaluation_in(const fs::path& path, std::size_t line, tasks::Difficulty difficulty,
                                      int64_t problems, uint64_t seed, const RoundFiles& round_files,
                                      const std::string& phase) {
  const auto lines = read_lines(path);
  if (line < lines.size()) {
    const auto where = path.string() + ":" + std::to_string(line + 1);
    auto found = evaluation_from_json(parse_json(lines[line], where), where);
    if (found.difficulty == config_.task->text(difficulty) && found.problems == problems) return found;
    fail_request("expected the evaluation of difficulty " + config_.task->text(difficulty), where,
                 "remove the file: it is made again");
  }
  const double started = monotonic_seconds();
  auto result = improve::evaluate(solver_, *config_.task, difficulty, problems, seed);
  LineAppender(path).append(dump_json(to_json(result)));
  round_files.add_time(phase, monotonic_seconds() - started);
  return result;
}

bool Improvement::evaluate() {
  const auto round_files = files(round_);
  const auto& task = *config_.task;
  auto grid = task.base_grid(config_.base);
  const int64_t last = std::min(reach_ + config_.evaluation_beyond, task.last_round(config_.base));
  for (int64_t rung = 1; rung <= last; ++rung) {
    const auto added = task.rung(config_.base, rung);
    grid.insert(grid.end(), added.begin(), added.end());
  }
  const int64_t problems = round_ == config_.rounds ? config_.final_problems : config_.evaluation_problems;
  std::string solved;
  for (std::size_t i = 0; i < grid.size(); ++i) {
    if (interrupted()) return false;
    const auto result =
        evaluation_in(round_files.evaluation(), i, grid[i], problems, config_.seed, round_files, "evaluate");
    if (result.mean() >= kSolved) solved = result.difficulty;
    tell([&](Listener& listener) {
      listener.on_progress(round_, "evaluate", static_cast<int64_t>(i + 1),
                           static_cast<int64_t>(grid.size()));
      listener.on_evaluation(round_, step_, result);
    });
  }
  tell([&](Listener& listener) { listener.on_round(round_, step_, solved, round_files.times()); });
  return true;
}

// Labelled problems choose the difficulties of the next round: the one place besides evaluation that looks at
// true answers (arXiv 2502.01612, section 7).
bool Improvement::probe(const RoundFiles& round_files, Plan& plan) {
  const auto& task = *config_.task;
  const int64_t last = task.last_round(config_.base);
  for (std::size_t line = 0; plan.reach < last;) {
    bool solved = true;
    const auto next = task.rung(config_.base, plan.reach + 1);
    for (const auto& difficulty : next) {
      if (interrupted()) return false;
      // Other problems than the evaluation's.
      const auto result = evaluation_in(round_files.probe(), line++, difficulty, config_.probe_problems,
                                        config_.seed + (uint64_t{1} << 40), round_files, "probe");
      solved = solved && result.mean() >= config_.probe_accuracy;
      tell([&](Listener& listener) {
        listener.on_progress(round_ + 1, "probe", plan.reach - reach_ + 1, last - reach_);
      });
    }
    if (!solved && plan.reach > reach_) return true;
    plan.difficulties.insert(plan.difficulties.end(), next.begin(), next.end());
    ++plan.reach;
    if (!solved) return true;
  }
  return true;
}

bool Improvement::plan(const RoundFiles& round_files) {
  if (round_files.has_plan()) return true;
  const auto& task = *config_.task;
  Plan plan{{}, reach_};
  const auto fixed = config_.accelerated ? task.accelerated_rungs(config_.base) : std::vector<int64_t>{};
  if (config_.accelerated && fixed.empty()) {
    if (!probe(round_files, plan)) return false;
  } else {
    const int64_t rungs = fixed.empty() ? 1 : fixed.at(static_cast<std::size_t>(round_));
    for (int64_t i = 0; i < rungs; ++i) {
      const auto added = task.rung(config_.base, ++plan.reach);
      plan.difficulties.insert(plan.difficulties.end(), added.begin(), added.end());
    }
  }
  round_files.write_plan(plan);
  return true;
}

bool Improvement::generate(const RoundFiles& round_files) {
  if (round_files.has_data()) return true;
  const auto plan = round_files.plan();
  const auto chunks = chunks_of(config_, plan.difficulties.size());
  int64_t total = 0;
  for (const auto& chunk : chunks) total += chunk.end - chunk.begin;

  // Whole chunks of an earlier sitting stay.
  auto lines = read_lines(round_files.answers());
  std::size_t next = 0;
  int64_t done = 0;
  for (; next < chunks.size(); ++next) {
    const int64_t after = done + chunks[next].end - chunks[next].begin;
    if (after > static_cast<int64_t>(lines.size())) break;
    done = after;
  }
  if (static_cast<int64_t>(lines.size()) > done) {
    std::string text;
    for (int64_t i = 0; i < done; ++i) text += lines[static_cast<std::size_t>(i)] + "\n";
    write_file_atomically(round_files.answers(), text);
  }

  LineAppender file(round_files.answers());
  for (; next < chunks.size(); ++next) {
    if (interrupted()) return false;
    const auto& chunk = chunks[next];
    const double started = monotonic_seconds();
    const auto difficulty = plan.difficulties[static_cast<std::size_t>(chunk.difficulty)];
    const auto text = config_.task->text(difficulty);
    std::vector<std::string> prompts;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      const auto index = (static_cast<uint64_t>(round_ + 1) << 32) + static_cast<uint64_t>(i);
      // The problem comes with its true answer, which stays here.
      prompts.push_back(tasks::training_problem(*config_.task, difficulty,
                                                seeds_[static_cast<std::size_t>(chunk.model)], index)
                            .prompt);
    }
    auto replies = solver_.solve(prompts, difficulty);
    std::string block;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      block +=
          (i > 0 ? "\n" : "") +
          RoundFiles::answer_line({chunk.model, chunk.difficulty, prompts[i], std::move(replies[i])}, text);
    }
    file.append(block);
    done += chunk.end - chunk.begin;
    round_files.add_time("generate", monotonic_seconds() - started);
    tell([&](Listener& listener) { listener.on_progress(round_ + 1, "generate", done, total); });
  }
  return true;
}

void Improvement::filter(const RoundFiles& round_files) {
  if (!round_files.has_data()) {
    const double started = monotonic_seconds();
    const auto plan = round_files.plan();
    const auto lines = read_lines(round_files.answers());
    std::vector<Candidate> candidates;
    for (const auto& chunk : chunks_of(config_, plan.difficulties.size())) {
      for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const auto where = round_files.answers().string() + ":" + std::to_string(candidates.size() + 1);
        candidates.push_back(round_files.answer(lines.at(candidates.size()), where));
        candidates.back().difficulty = chunk.difficulty;
      }
    }
    LabelReport report;
    const auto kept = [&] {
      return std::count_if(candidates.begin(), candidates.end(), [](const Candidate& c) { return c.kept; });
    };
    const auto accuracy = [&] {
      const auto right = std::count_if(candidates.begin(), candidates.end(), [&](const Candidate& c) {
        return c.kept && c.answer().ended && c.answer().text == truth_(c.prompt);
      });
      const auto all = kept();
      return all > 0 ? static_cast<double>(right) / static_cast<double>(all)
                     : std::numeric_limits<double>::quiet_NaN();
    };
    report.generated = static_cast<int64_t>(candidates.size());
    report.unended = std::count_if(candidates.begin(), candidates.end(),
                                   [](const Candidate& c) { return !c.answer().ended; });
    report.accuracy_before = accuracy();
    for (const auto& step : make_filters(config_)) {
      step->apply(candidates);
      report.left.emplace_back(step->name(), kept());
    }
    report.kept = kept();
    report.accuracy_after = accuracy();
    round_files.write_data(candidates, plan.difficulties, report);
    round_files.add_time("filter", monotonic_seconds() - started);
  }
  const auto report = round_files.labels();
  if (report.kept == 0) {
    const auto what = "round " + std::to_string(round_ + 1) + ": the filters dropped all " +
                      std::to_string(report.generated) + " answers";
    if (config_.stop_when_empty) {
      fail_work(what, round_files.folder().string(),
                "the model is kept; loosen the filters, or set improve.when_empty = \"continue\"");
    }
    log_warning(what + "; it trains on the data of earlier rounds");
  }
  tell([&](Listener& listener) { listener.on_labels(round_ + 1, step_, report); });
}

void Improvement::begin_round(const RoundFiles& round_files) {
  const auto plan = round_files.plan();
  reach_ = plan.reach;
  // An older set counts by the difficulties it spans (section 7), except where the schedule is fixed.
  const bool spans = config_.accelerated && config_.task->accelerated_rungs(config_.base).empty();
  const double weight = spans ? static_cast<double>(plan.difficulties.size()) : 1;
  auto data = round_files.data(config_.models);
  for (std::size_t k = 0; k < mixtures_.size(); ++k) mixtures_[k].add(std::move(data[k]), weight);
}

}  // namespace megalodon::improve
