#include <cmath>
#include <memory>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/signals.h"
#include "cli/command.h"
#include "cli/run_folder.h"
#include "improve/improvement.h"
#include "improve/metrics.h"
#include "ops/device.h"
#include "report/improve_report.h"
#include "report/tensorboard.h"

namespace megalodon::cli {
namespace {
namespace fs = std::filesystem;

struct Options {
  std::string config, device;
  std::vector<std::string> overrides;
  bool resume = false;
};

class TensorBoard : public improve::Listener {
 public:
  TensorBoard(const fs::path& folder, int64_t resumed_step) : writer_(folder) {
    if (resumed_step > 0) writer_.discard_from(resumed_step + 1);
  }
  void on_start(const Json& facts) override {
    writer_.add_text("run", dump_json(facts), facts["step"].get<int64_t>());
  }
  void on_step(const improve::StepMetrics& m) override {
    writer_.add_scalar("train/loss", m.loss, m.step);
    writer_.add_scalar("train/gradient_norm", m.gradient_norm, m.step);
    writer_.add_scalar("train/learning_rate", m.learning_rate, m.step);
    writer_.add_scalar("train/round", static_cast<double>(m.round), m.step);
  }
  void on_labels(int64_t, int64_t step, const improve::LabelReport& r) override {
    writer_.add_scalar("labels/kept", static_cast<double>(r.kept), step);
    writer_.add_scalar("labels/accuracy_before", r.accuracy_before, step);
    writer_.add_scalar("labels/accuracy_after", r.accuracy_after, step);
  }
  void on_evaluation(int64_t, int64_t step, const improve::Evaluation& e) override {
    writer_.add_scalar("accuracy/" + e.difficulty, e.mean(), step);
  }

 private:
  report::EventWriter writer_;
};

class ProgressBar : public improve::Listener {
 public:
  ProgressBar(const improve::ImproveConfig& config, int64_t resumed_step)
      : rounds_(config.rounds),
        bar_("improve", config.first.steps() + config.rounds * config.later.steps(), "step"),
        step_(resumed_step) {
    bar_.start_at(resumed_step);
  }
  void on_step(const improve::StepMetrics& m) override {
    char text[64];
    std::snprintf(text, sizeof text, "loss %.4f", m.loss);
    show(m.round, m.step, text);
  }
  void on_progress(int64_t round, const std::string& phase, int64_t done, int64_t total) override {
    show(round, step_, phase + " " + std::to_string(done) + "/" + std::to_string(total));
  }
  void on_evaluation(int64_t, int64_t, const improve::Evaluation& e) override {
    if (e.mean() >= improve::kSolved)
      solved_ = e.difficulty;
    else if (frontier_.empty())
      frontier_ = e.difficulty + " at " + percent(e.mean());
  }
  void on_labels(int64_t round, int64_t, const improve::LabelReport& r) override {
    log_note("round " + std::to_string(round) + ": " + std::to_string(r.kept) + " of " +
             std::to_string(r.generated) + " answers kept; right: " + percent(r.accuracy_before) +
             " before, " + percent(r.accuracy_after) + " after the filters" +
             (r.unended > 0 ? "; " + std::to_string(r.unended) + " never ended" : ""));
  }
  void on_round(int64_t round, int64_t, const std::string& solved,
                const std::map<std::string, double>&) override {
    log_note("round " + std::to_string(round) + ": solves " + (solved.empty() ? "nothing yet" : solved) +
             (frontier_.empty() ? "" : "; " + frontier_));
    frontier_.clear();
  }

 private:
  static std::string percent(double share) {
    if (std::isnan(share)) return "none";
    char text[32];
    std::snprintf(text, sizeof text, "%.1f%%", 100 * share);
    return text;
  }
  void show(int64_t round, int64_t step, const std::string& what) {
    step_ = step;
    bar_.update(step, "round " + std::to_string(round) + "/" + std::to_string(rounds_) + ", " + what +
                          (solved_.empty() ? "" : ", solves " + solved_));
  }

  int64_t rounds_;
  Progress bar_;
  int64_t step_;
  std::string solved_, frontier_;
};

int run(const Options& o) {
  auto overrides = o.overrides;
  if (!o.device.empty()) overrides.push_back("device=\"" + o.device + "\"");
  auto toml = Config::from_file(o.config, overrides);
  const auto config = improve::read_improve_config(toml);
  ops::expect_changing_sizes();  // problems grow from round to round
  const auto device = ops::open_device(config.device);
  if (config.deterministic) ops::make_deterministic();
  const auto tokenizer = data::make_symbol_tokenizer(config.task->symbols());
  const auto model_config = model::read_model_config(toml, tokenizer->vocabulary_size());
  toml.finish();
  const auto models = model::make_stack(model_config, improve::model_seeds(config));
  models->to(device);

  make_run_folder(config.run);
  const FolderLock lock(config.run);
  settle_configuration(config.run, toml.resolved(), o.resume, improve::may_change_on_resume);
  improve::Improvement improvement(config, *models, *tokenizer,
                                   [&](const std::string& prompt) { return config.task->solve(prompt); });
  const int64_t step = improvement.resume();
  improve::MetricsFile metrics(config.run / "metrics.jsonl", step);
  TensorBoard tensorboard(config.run / "tb", step);
  catch_interrupts();
  bool finished = false;
  {
    ProgressBar progress(config, step);
    const std::vector<improve::Listener*> listeners{&metrics, &tensorboard, &progress};
    const Json facts{{"kind", step > 0 ? "resume" : "start"},
                     {"step", step},
                     {"time", time_now()},
                     {"task", config.task->name()},
                     {"base", config.base},
                     {"rounds", config.rounds},
                     {"models", config.models},
                     {"parameters", models->parameter_count() / config.models},
                     {"model", model::model_type(models->config())},
                     {"device", c10::DeviceTypeName(device.type(), /*lower_case=*/true)},
                     {"compute_type", config.compute_type}};
    for (auto* listener : listeners) listener->on_start(facts);
    finished = improvement.run(listeners);
  }
  report::write_improve_report(config.run);
  const auto page = (config.run / "report.html").string();
  if (!finished) {
    log_note("interrupted; what is done is saved: continue with megalodon improve " + o.config + " --resume");
    return static_cast<int>(Error::Kind::work);
  }
  log_note("done: report in " + page);
  return 0;
}

}  // namespace

void add_improve(CLI::App& program, Run& chosen) {
  auto* command = program.add_subcommand(
      "improve", "Self-improvement: a model learns short problems, then from its own answers to longer ones");
  auto o = std::make_shared<Options>();
  command->add_option("CONFIG", o->config, "a TOML configuration (docs/self-improvement.md)")->required();
  command->add_flag("--resume", o->resume, "go on from where the run directory stands");
  command->add_option("--set", o->overrides, "key=value: overrides a key of the configuration")
      ->allow_extra_args(false);
  add_device(*command, o->device);
  command->callback([o, &chosen] { chosen = [o] { return run(*o); }; });
}

}  // namespace megalodon::cli
