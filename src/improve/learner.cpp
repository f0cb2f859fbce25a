#include "improve/learner.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "model/model_folder.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::improve {
namespace {

std::filesystem::path member_folder(const std::filesystem::path& folder, int64_t k, int64_t K) {
  return K == 1 ? folder : folder / ("model-" + std::to_string(k + 1));
}

struct Row {
  std::vector<int32_t> ids;
  std::size_t prompt;  // of them, with BOS

  int64_t inputs() const { return static_cast<int64_t>(ids.size()) - 1; }
  // The positions that there are to learn from, and what follows each of them.
  void write(int64_t* tokens, int64_t* targets) const {
    std::copy(ids.begin(), ids.end() - 1, tokens);
    std::copy(ids.begin() + static_cast<std::ptrdiff_t>(prompt), ids.end(), targets + prompt - 1);
  }
};

std::vector<Row> rows_of(const data::Tokenizer& tokenizer, std::span<const Example> examples) {
  std::vector<Row> rows;
  for (const auto& example : examples) {
    auto ids = prompt_tokens(tokenizer, example.prompt);
    const auto prompt = ids.size();
    const auto label = tokenizer.encode(example.label);
    ids.insert(ids.end(), label.begin(), label.end());
    if (example.ended) ids.push_back(tokenizer.end_of_document());
    rows.push_back({std::move(ids), prompt});
  }
  return rows;
}

int64_t longest_of(const std::vector<Row>& rows) {
  int64_t longest = 0;
  for (const auto& row : rows) longest = std::max(longest, row.inputs());
  return longest;
}

train::Batch empty_batch(const data::Tokenizer& tokenizer, int64_t N, int64_t L) {
  return {at::full({N, L}, int64_t{tokenizer.end_of_document()}, at::kLong),
          at::full({N, L}, ops::kIgnoredTarget, at::kLong),
          {}};
}

int64_t rounded_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t kLengths = 8;  // of rows on a GPU: few different ones, each of which is recorded once

}  // namespace

std::vector<int32_t> prompt_tokens(const data::Tokenizer& tokenizer, std::string_view prompt) {
  auto ids = tokenizer.encode(prompt);
  ids.insert(ids.begin(), tokenizer.beginning_of_sequence());
  return ids;
}

train::Batch padded_batch(const data::Tokenizer& tokenizer, std::span<const Example> examples,
                          int64_t multiple) {
  const auto rows = rows_of(tokenizer, examples);
  const auto L = rounded_up(longest_of(rows), multiple);
  auto batch = empty_batch(tokenizer, static_cast<int64_t>(rows.size()), L);
  auto* tokens = batch.tokens.mutable_data_ptr<int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<int64_t>();
  for (const auto& row : rows) {
    row.write(tokens, targets);
    tokens += L;
    targets += L;
  }
  return batch;
}

train::Batch packed_batch(const data::Tokenizer& tokenizer, std::span<const Example> examples,
                          int64_t models) {
  const auto rows = rows_of(tokenizer, examples);
  const auto each = rows.size() / static_cast<std::size_t>(models);
  std::vector<int64_t> totals(static_cast<std::size_t>(models));
  for (std::size_t i = 0; i < rows.size(); ++i) totals[i / each] += rows[i].inputs();
  const auto [least, most] = std::ranges::minmax(totals);
  const auto step =
      static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(most / 32, 1))));
  const int64_t T = rounded_up(most, step), longest = rounded_up(longest_of(rows), kLengths);
  const int64_t fillers = (rounded_up(std::max<int64_t>(T - least, 1), step) + longest - 1) / longest;

  auto batch = empty_batch(tokenizer, models, T);
  auto* tokens = batch.tokens.mutable_data_ptr<int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<int64_t>();
  std::vector<int32_t> borders{0};
  int64_t end = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i].write(tokens + end, targets + end);
    end += rows[i].inputs();
    borders.push_back(static_cast<int32_t>(end));
    if ((i + 1) % each != 0) continue;
    const auto of_model = static_cast<int64_t>((i + 1) / each) * T;
    for (int64_t j = 0; j < fillers; ++j) {
      end = std::min(end + longest, of_model);
      borders.push_back(static_cast<int32_t>(end));
    }
  }
  batch.sequences = {at::tensor(borders, at::kInt), longest};
  return batch;
}

train::Batch Learner::batch(const data::Tokenizer& tokenizer, std::span<const Example> examples) const {
  const bool on_gpu = models_.device().is_cuda();
  const auto batch = models_.packs() ? packed_batch(tokenizer, examples, models_.stack())
                                     : padded_batch(tokenizer, examples, on_gpu ? kLengths : 1);
  return on_gpu ? batch.pinned() : batch;
}

void Learner::start(const train::Batch& batch, double rate) {
  training_step_.start(batch, rate);
  tokens_ = batch.tokens.numel();
}

Learner::Outcome Learner::finish() {
  const auto outcome = training_step_.finish();
  const auto& norms = outcome.gradient_norms;
  return {std::reduce(outcome.losses.begin(), outcome.losses.end()) / static_cast<double>(models_.stack()),
          *std::max_element(norms.begin(), norms.end()), tokens_, outcome.skipped};
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
