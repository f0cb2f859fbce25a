#include "train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <numbers>

#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/signals.h"
#include "base/system.h"
#include "model/model_folder.h"
#include "ops/float8/float8.h"

namespace megalodon::train {
namespace {

constexpr int64_t kMostSkipped = 10;

// The mean loss of tokens [n, context + 1], each predicted from those before it.
at::Tensor mean_loss(const model::LanguageModel& model, const at::Tensor& tokens,
                     model::DropoutKeys* dropout) {
  const int64_t L = tokens.size(1) - 1;
  const auto on_device = tokens.to(model.device());
  return model.mean_loss(on_device.narrow(1, 0, L), on_device.narrow(1, 1, L), dropout);
}

}  // namespace

Trainer::Trainer(const TrainConfig& config, model::LanguageModel& model, const data::Tokenizer& tokenizer,
                 const data::Corpus& training, const data::Corpus& validation)
    : config_(config),
      model_(model),
      tokenizer_(tokenizer),
      training_(training),
      validation_(validation),
      order_(training.tokens(), config.context, config.batch, config.seed),
      optimizer_(model.parameters(), config.optimizer),
      training_step_(model, optimizer_),
      checkpoints_(config.run / "checkpoints", config.checkpoint_keep) {
  model_.set_compute_type(config.compute_type == "bfloat16" ? at::kBFloat16 : at::kFloat);
  if (config.products == "float8" && !ops::has_float8_units(model.parameters()[0].value)) {
    fail_request("this device has no units for float8 products", "train.products",
                 "use a GPU of compute capability 8.9 or higher, or \"compute_type\"");
  }
  model_.set_float8_products(config.products == "float8");
  model_.set_recomputation(config.recompute);
}

int64_t Trainer::resume() {
  const auto found = checkpoints_.latest();
  if (!found) return 0;
  model::load_weights(model_, found->folder);
  optimizer_.load(SafetensorsFile(found->folder / "optimizer.safetensors"));
  const auto path = found->folder / "trainer.json";
  const auto state = parse_json(read_file(path), path.string());
  step_ = json_member<int64_t>(state, "step", path.string());
  skipped_in_row_ = json_member<int64_t>(state, "skipped_in_row", path.string());
  seconds_ = json_member<double>(state, "seconds", path.string());
  return step_;
}

void Trainer::save() const {
  checkpoints_.save(step_, [&](const std::filesystem::path& folder) {
    model::save_model(model_, folder);
    tokenizer_.save(folder);
    model::save_tensors(folder / "optimizer.safetensors", optimizer_.state());
    const Json state{{"step", step_}, {"skipped_in_row", skipped_in_row_}, {"seconds", seconds_}};
    write_file_atomically(folder / "trainer.json", state.dump(2) + "\n");
  });
}

at::Tensor Trainer::windows(const data::Corpus& corpus, const std::vector<int64_t>& starts) const {
  const int64_t length = config_.context + 1;
  auto tokens = at::empty({static_cast<int64_t>(starts.size()), length}, at::kInt);
  auto* row = tokens.mutable_data_ptr<int32_t>();
  for (const int64_t start : starts) {
    corpus.read(start, {row, static_cast<std::size_t>(length)});
    row += length;
  }
  return tokens.to(at::kLong);
}

StepMetrics Trainer::step() {
  const double started = monotonic_seconds();
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < config_.batch; ++i) starts.push_back(order_.position(step_, i));
  const auto tokens = windows(training_, starts);
  const double rate = config_.schedule.rate(step_);
  model::DropoutKeys dropout(config_.seed, static_cast<uint64_t>(step_));
  const auto outcome =
      training_step_({tokens.narrow(1, 0, config_.context), tokens.narrow(1, 1, config_.context), {}}, rate,
                     config_.batch / config_.micro_batch, &dropout);
  skipped_in_row_ = outcome.skipped ? skipped_in_row_ + 1 : 0;
  ++step_;
  const double seconds = monotonic_seconds() - started;
  seconds_ += seconds;
  const int64_t per_step = config_.tokens_per_step();
  return {step_,
          step_ * per_step,
          outcome.losses[0],
          rate,
          outcome.gradient_norms[0],
          seconds_,
          static_cast<double>(per_step) / seconds,
          outcome.skipped};
}

ValidationMetrics Trainer::validate() const {
  const at::NoGradGuard no_grad;
  const int64_t length = config_.context + 1, available = validation_.tokens() - length;
  const int64_t count = std::min(config_.validation_windows, available / length + 1);
  double loss = 0, bytes = 0;
  for (int64_t i = 0; i < count; ++i) {  // spread evenly
    const auto tokens = windows(validation_, {count > 1 ? available * i / (count - 1) : 0});
    loss += mean_loss(model_, tokens, nullptr).item<double>() / static_cast<double>(count);
    const auto ids = tokens.to(at::kInt).contiguous();
    const std::span<const int32_t> targets(ids.const_data_ptr<int32_t>() + 1,
                                           static_cast<std::size_t>(config_.context));
    bytes += static_cast<double>(tokenizer_.decode(targets).size());
  }
  const double nats = loss * static_cast<double>(count * config_.context);
  return {step_,          step_ * config_.tokens_per_step(), loss,
          std::exp(loss), nats / std::numbers::ln2 / bytes,  seconds_};
}

bool Trainer::run(const std::vector<Listener*>& listeners) {
  const auto due = [&](int64_t every) { return step_ == config_.steps || (every > 0 && step_ % every == 0); };
  int64_t saved = step_;
  while (step_ < config_.steps && !interrupted()) {
    const auto metrics = step();
    for (auto* listener : listeners) listener->on_step(metrics);
    if (metrics.skipped) {
      log_warning("step " + std::to_string(step_) + " skipped: its loss or gradient is not finite");
      if (skipped_in_row_ == kMostSkipped) {
        fail_work(std::to_string(kMostSkipped) + " steps in a row were not finite",
                  "step " + std::to_string(step_),
                  "lower the learning rate; the last good checkpoint is kept");
      }
    }
    if (due(config_.validation_every)) {
      const auto validation = validate();
      for (auto* listener : listeners) listener->on_validation(validation);
    }
    if (due(config_.checkpoint_every)) {
      save();
      saved = step_;
    }
  }
  if (saved != step_) save();
  return step_ == config_.steps;
}

}  // namespace megalodon::train
