#include "model/language_model.h"

#include "base/hash.h"
#include "base/random.h"
#include "model/llama.h"
#include "model/megalodon.h"

namespace megalodon::model {

int64_t DropoutKeys::next() {
  const auto words = philox(random_key(seed_, Purpose::dropout), step_, used_++);
  return static_cast<int64_t>(words[0] | (uint64_t{words[1]} << 32));
}

int64_t LanguageModel::parameter_count() const {
  int64_t count = 0;
  for (const auto& parameter : parameters_) count += parameter.value.numel();
  return count;
}

std::unique_ptr<LanguageModel> make_model(const ModelConfig& config, uint64_t seed, bool initialise) {
  if (const auto* megalodon = std::get_if<MegalodonConfig>(&config)) {
    return std::make_unique<Megalodon>(*megalodon, seed, initialise);
  }
  return std::make_unique<Llama>(std::get<LlamaConfig>(config), seed, initialise);
}

std::string fingerprint(const ModelConfig& config) {
  auto json = to_json(config);
  for (const char* key : {"dropout", "hidden_dropout", "attention_dropout", "initializer_range"})
    json.erase(key);
  return hex(xxh3(dump_json(json)));
}

}  // namespace megalodon::model
