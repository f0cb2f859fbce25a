#include <memory>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/signals.h"
#include "cli/command.h"
#include "cli/run_folder.h"
#include "model/model_folder.h"
#include "ops/device.h"
#include "report/run_report.h"
#include "report/tensorboard.h"
#include "train/corpora.h"
#include "train/trainer.h"

namespace megalodon::cli {
namespace {
namespace fs = std::filesystem;

struct Options {
  std::string config, device;
  std::vector<std::string> overrides;
  bool resume = false;
};

class TensorBoard : public train::Listener {
 public:
  TensorBoard(const fs::path& folder, int64_t resumed_step) : writer_(folder) {
    if (resumed_step > 0) writer_.discard_from(resumed_step + 1);
  }
  void on_start(const Json& facts) override {
    writer_.add_text("run", dump_json(facts), facts["step"].get<int64_t>());
  }
  void on_step(const train::StepMetrics& m) override {
    writer_.add_scalar("train/loss", m.loss, m.step);
    writer_.add_scalar("train/gradient_norm", m.gradient_norm, m.step);
    writer_.add_scalar("train/learning_rate", m.learning_rate, m.step);
    writer_.add_scalar("train/tokens_per_second", m.tokens_per_second, m.step);
  }
  void on_validation(const train::ValidationMetrics& m) override {
    writer_.add_scalar("validation/loss", m.loss, m.step);
    writer_.add_scalar("validation/perplexity", m.perplexity, m.step);
    writer_.add_scalar("validation/bits_per_byte", m.bits_per_byte, m.step);
  }

 private:
  report::EventWriter writer_;
};

class ProgressBar : public train::Listener {
 public:
  ProgressBar(int64_t steps, int64_t resumed_step) : bar_("train", steps, "step") {
    bar_.start_at(resumed_step);
  }
  void on_start(const Json&) override {}
  void on_step(const train::StepMetrics& m) override {
    char text[96];
    std::snprintf(text, sizeof text, "loss %.4f%s, %s tokens/s", m.loss, validation_.c_str(),
                  human_count(m.tokens_per_second).c_str());
    bar_.update(m.step, text);
  }
  void on_validation(const train::ValidationMetrics& m) override {
    char text[64];
    std::snprintf(text, sizeof text, ", validation %.4f (%.4f bits/byte)", m.loss, m.bits_per_byte);
    validation_ = text;
  }

 private:
  Progress bar_;
  std::string validation_;
};

std::unique_ptr<model::LanguageModel> open_model(const std::string& from, const data::Tokenizer& tokenizer) {
  auto model = model::load_model(from);
  for (const auto& parameter : model->parameters()) parameter.value.set_requires_grad(true);
  check_fits(tokenizer, *model, from);
  return model;
}

int run(const Options& o) {
  auto overrides = o.overrides;
  if (!o.device.empty()) overrides.push_back("device=\"" + o.device + "\"");
  auto toml = Config::from_file(o.config, overrides);
  const auto config = train::read_train_config(toml);
  const auto device = ops::open_device(config.device);
  if (config.deterministic) ops::make_deterministic();
  // All keys are checked before anything is written; the vocabulary is known once the data is open.
  const bool fresh = config.from.empty();
  if (fresh) model::read_model_config(toml, 1);
  toml.finish();
  make_run_folder(config.run);
  const FolderLock lock(config.run);
  const auto corpora = train::open_corpora(config);
  const auto model_config =
      fresh ? std::optional(model::read_model_config(toml, corpora.tokenizer->vocabulary_size()))
            : std::nullopt;
  settle_configuration(config.run, toml.resolved(), o.resume, train::may_change_on_resume);
  const auto model =
      fresh ? model::make_model(*model_config, config.seed) : open_model(config.from, *corpora.tokenizer);
  model->to(device);

  train::Trainer trainer(config, *model, *corpora.tokenizer, *corpora.training, *corpora.validation);
  const int64_t step = trainer.resume();
  train::MetricsFile metrics(config.run / "metrics.jsonl", step);
  TensorBoard tensorboard(config.run / "tb", step);
  catch_interrupts();
  bool finished = false;
  {
    ProgressBar progress(config.steps, step);
    const std::vector<train::Listener*> listeners{&metrics, &tensorboard, &progress};
    const Json facts{{"kind", step > 0 ? "resume" : "start"},
                     {"step", step},
                     {"time", time_now()},
                     {"data", joined(config.data.train)},
                     {"parameters", model->parameter_count()},
                     {"model", model::model_type(model->config())},
                     {"device", c10::DeviceTypeName(device.type(), /*lower_case=*/true)},
                     {"compute_type", config.compute_type}};
    for (auto* listener : listeners) listener->on_start(facts);
    finished = trainer.run(listeners);
  }
  report::write_run_report(config.run);
  if (!finished) {
    log_note("interrupted; the checkpoint is saved: continue with megalodon train " + o.config + " --resume");
    return static_cast<int>(Error::Kind::work);
  }
  log_note("done: model in " +
           (config.run / "checkpoints" / ("step-" + std::to_string(config.steps))).string() + ", report in " +
           (config.run / "report.html").string());
  return 0;
}

}  // namespace

void add_train(CLI::App& program, Run& chosen) {
  auto* command = program.add_subcommand("train", "Train or fine-tune a model; writes a run directory");
  auto o = std::make_shared<Options>();
  command->add_option("CONFIG", o->config, "a TOML configuration (docs/configuration.md)")->required();
  command->add_flag("--resume", o->resume, "go on from the newest checkpoint of the run directory");
  command->add_option("--set", o->overrides, "key=value: overrides a key of the configuration")
      ->allow_extra_args(false);
  add_device(*command, o->device);
  command->callback([o, &chosen] { chosen = [o] { return run(*o); }; });
}

}  // namespace megalodon::cli
