#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include "golden.h"
#include "model/megalodon.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::golden {
namespace {

constexpr double kOutput = 3e-6, kGradient = 5e-6, kStream = 1e-4;

// The metadata are config.json's members as strings, with Python's booleans.
model::MegalodonConfig config_of(const SafetensorsFile& file) {
  Json json = {{"model_type", "megalodon"}};
  for (const auto& [key, value] : file.header().metadata) {
    if (key == "stream_splits" || key == "init_mode" || key == "layerwise_ckpt" || key == "output_size")
      continue;
    json[key] = value == "True"    ? Json(true)
                : value == "False" ? Json(false)
                                   : parse_json(value, file.path().string());
  }
  return std::get<model::MegalodonConfig>(model::from_json(json, file.path().string()));
}

at::Tensor tokens_of(const SafetensorsFile& file, const char* name) {
  return read_tensor(file, name).to(at::kLong);
}

void check_gradients(const SafetensorsFile& file, const model::Megalodon& model, Errors& errors) {
  const auto logits = model.forward(tokens_of(file, "tokens"));
  const auto nll =
      ops::cross_entropy(logits.view({-1, logits.size(-1)}), tokens_of(file, "targets").view(-1));
  const auto loss = nll.mean();
  errors.compare("logits", logits, read_tensor(file, "logits"), kOutput);
  errors.compare("loss", loss.view({1}), read_tensor(file, "loss"), kOutput);
  torch::autograd::backward({loss}, {});
  for (const auto& parameter : model.parameters()) {
    errors.compare("gradients", parameter.value.grad(), read_tensor(file, "grad." + parameter.name),
                   kGradient);
  }
}

void check_stream(const SafetensorsFile& file, const model::Megalodon& model, int64_t chunk, Errors& errors) {
  const at::NoGradGuard no_grad;
  const auto tokens = tokens_of(file, "tokens");
  auto state = model.fresh_state(tokens.size(0), tokens.size(1));
  std::vector<at::Tensor> pieces;
  int64_t position = 0;
  for (const auto& split : parse_json(file.header().metadata.at("stream_splits"), file.path().string())) {
    const auto length = split.get<int64_t>();
    pieces.push_back(model.forward(tokens.narrow(1, position, length), &state));
    position += length;
  }
  errors.compare_absolute("streamed logits", at::cat(pieces, 1), read_tensor(file, "stream_logits"), kStream);
  for (const auto& [name, info] : file.header().tensors) {
    if (!name.starts_with("state.")) continue;
    auto got = state.tensors.at(name.substr(6));
    const auto want = read_tensor(file, name);
    if (name.ends_with("_count")) {
      errors.require_equal("count", got, want);
      continue;
    }
    if (name.ends_with(".k") || name.ends_with(".v"))
      got = got.narrow(1, 0, position % chunk);  // the unfinished chunk
    errors.compare("state", got, want, kOutput);
  }
}

}  // namespace

Errors check_model(const SafetensorsFile& file) {
  const auto config = config_of(file);
  model::Megalodon model(config, 0, /*initialise=*/false);
  for (const auto& parameter : model.parameters()) {
    const at::NoGradGuard no_grad;
    auto value = parameter.value;
    value.copy_(read_tensor(file, "param." + parameter.name).view(value.sizes()));
  }
  model.to(ops::testing::device());
  Errors errors;
  check_gradients(file, model, errors);
  if (file.has("stream_logits")) check_stream(file, model, config.chunk_size, errors);
  return errors;
}

}  // namespace megalodon::golden
