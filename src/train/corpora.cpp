#include "train/corpora.h"

#include "base/error.h"
#include "base/log.h"
#include "data/prepare.h"

namespace megalodon::train {
namespace {
namespace fs = std::filesystem;

bool is_prepared(const std::vector<std::string>& sources) {
  return sources.size() == 1 && fs::exists(fs::path(sources[0]) / "manifest.json");
}

void prepare(const TrainConfig& config, const fs::path& out) {
  const std::vector<fs::path> inputs(config.data.train.begin(), config.data.train.end());
  const auto tokenizer = data::open_tokenizer(config.data.tokenizer, inputs);
  data::PrepareOptions options;
  options.validation_share = config.data.validation_share;
  options.validation_inputs.assign(config.data.validation.begin(), config.data.validation.end());
  options.seed = config.seed;
  const auto summary = data::prepare(inputs, *tokenizer, out, options);
  log_note("prepared " + human_count(static_cast<double>(summary.train.tokens)) + " tokens to train on and " +
           human_count(static_cast<double>(summary.validation.tokens)) + " to validate");
}

}  // namespace

Corpora open_corpora(const TrainConfig& config) {
  fs::path folder = config.run / "data";
  if (is_prepared(config.data.train)) {
    folder = config.data.train[0];
  } else if (!fs::exists(folder / "manifest.json")) {
    prepare(config, folder);
  }
  Corpora corpora;
  corpora.tokenizer = data::load_tokenizer(folder);
  corpora.training = std::make_unique<data::Corpus>(folder, "train");
  const bool apart = is_prepared(config.data.validation);
  corpora.validation =
      std::make_unique<data::Corpus>(apart ? fs::path(config.data.validation[0]) : folder, "validation");
  corpora.training->check_tokenizer(*corpora.tokenizer);
  corpora.validation->check_tokenizer(*corpora.tokenizer);
  if (corpora.validation->tokens() < config.context + 1) {
    fail_request("the validation data has " + std::to_string(corpora.validation->tokens()) +
                     " tokens, fewer than train.context + 1",
                 folder.string(), "raise data.validation_share or lower train.context");
  }
  return corpora;
}

}  // namespace megalodon::train
