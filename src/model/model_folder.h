#pragma once
#include <filesystem>
#include <memory>

#include "model/language_model.h"

namespace megalodon::model {

// A model directory in the Hugging Face manner: config.json and model.safetensors, beyond 5 GB in shards
// beside model.safetensors.index.json. The tokenizer's files lie there too (data/tokenizer.h).

// Writes config.json and the weights, each atomically.
void save_model(const LanguageModel& model, const std::filesystem::path& folder,
                std::size_t shard_bytes = std::size_t{5} << 30);

// Reads what save_model wrote, or a Hugging Face Llama. Missing, superfluous or misshapen tensors are request
// errors that name them. float32 by default; `type` casts matrices once, so that no call casts them again.
std::unique_ptr<LanguageModel> load_model(const std::filesystem::path& folder,
                                          at::ScalarType type = at::kFloat);

// Fills the parameters of `model` from the weights in `folder`.
void load_weights(const LanguageModel& model, const std::filesystem::path& folder);

}  // namespace megalodon::model
