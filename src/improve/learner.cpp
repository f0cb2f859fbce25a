#include "improve/learner.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "model/model_folder.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::improve {
namespace {

std::filesystem::path member_folder(const std::filesystem::path& folder, int64_t k, int64_t K) {
  return K == 1 ? folder : folder / ("model-" + std::to_string(k + 1));
}

}  // namespace

std::vector<int32_t> prompt_tokens(const data::Tokenizer& tokenizer, std::string_view prompt) {
  auto ids = tokenizer.encode(prompt);
  ids.insert(ids.begin(), tokenizer.beginning_of_sequence());
  return ids;
}

Batch make_batch(const data::Tokenizer& tokenizer, std::span<const Example> examples) {
  std::vector<std::vector<int32_t>> rows;
  std::vector<std::size_t> prompt_lengths;
  std::size_t longest = 0;
  for (const auto& example : examples) {
    auto row = prompt_tokens(tokenizer, example.prompt);
    prompt_lengths.push_back(row.size());
    const auto label = tokenizer.encode(example.label);
    row.insert(row.end(), label.begin(), label.end());
    if (example.ended) row.push_back(tokenizer.end_of_document());
    longest = std::max(longest, row.size());
    rows.push_back(std::move(row));
  }
  const auto N = static_cast<int64_t>(rows.size()), L = static_cast<int64_t>(longest) - 1;
  Batch batch{at::full({N, L}, int64_t{tokenizer.end_of_document()}, at::kLong),
              at::full({N, L}, ops::kIgnoredTarget, at::kLong)};
  auto* tokens = batch.tokens.mutable_data_ptr<int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<int64_t>();
  for (std::size_t i = 0; i < rows.size(); ++i, tokens += L, targets += L) {
    const auto& row = rows[i];
    std::copy(row.begin(), row.end() - 1, tokens);
    std::copy(row.begin() + static_cast<std::ptrdiff_t>(prompt_lengths[i]), row.end(),
              targets + prompt_lengths[i] - 1);
  }
  return batch;
}

Learner::Outcome Learner::step(const Batch& batch, double rate) {
  auto tokens = batch.tokens, targets = batch.targets;
  if (models_.device().is_cuda()) {  // few different shapes: each is recorded once
    const int64_t missing = (8 - tokens.size(1) % 8) % 8;
    tokens = at::constant_pad_nd(tokens, {0, missing}, 0);
    targets = at::constant_pad_nd(targets, {0, missing}, ops::kIgnoredTarget);
  }
  const auto outcome = training_step_(tokens, targets, rate);
  const auto& norms = outcome.gradient_norms;
  return {std::reduce(outcome.losses.begin(), outcome.losses.end()) / static_cast<double>(models_.stack()),
          *std::max_element(norms.begin(), norms.end()), batch.tokens.numel(), outcome.skipped};
}

void save_members(const model::LanguageModel& models, const data::Tokenizer& tokenizer,
                  const std::filesystem::path& folder) {
  for (int64_t k = 0; k < models.stack(); ++k) {
    const auto place = member_folder(folder, k, models.stack());
    model::save_model(*model::member(models, k), place);
    tokenizer.save(place);
  }
}

void Learner::save(const data::Tokenizer& tokenizer, const std::filesystem::path& folder) const {
  save_members(models_, tokenizer, folder);
  model::save_tensors(folder / "optimizer.safetensors", optimizer_.state());
}

void Learner::load(const std::filesystem::path& folder) {
  for (int64_t k = 0; k < models_.stack(); ++k) {
    model::load_weights(*model::member(models_, k), member_folder(folder, k, models_.stack()));
  }
  optimizer_.load(SafetensorsFile(folder / "optimizer.safetensors"));
}

}  // namespace megalodon::improve
