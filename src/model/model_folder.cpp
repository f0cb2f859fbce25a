#include "model/model_folder.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <map>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "model/tensor_file.h"

namespace megalodon::model {
namespace {
namespace fs = std::filesystem;

const char kWeights[] = "model.safetensors";
const char kIndex[] = "model.safetensors.index.json";

std::string shape_text(at::IntArrayRef shape) {
  return Json(shape.vec()).dump();
}

// Where each tensor lies: the one file, or the shards of the index.
std::map<std::string, fs::path> locate(const fs::path& folder, std::map<fs::path, SafetensorsFile>& files) {
  std::map<std::string, fs::path> places;
  if (!fs::exists(folder / kIndex)) {
    const auto& file = files.try_emplace(folder / kWeights, folder / kWeights).first->second;
    for (const auto& [name, info] : file.header().tensors) places[name] = folder / kWeights;
    return places;
  }
  const std::string where = (folder / kIndex).string();
  const auto index = parse_json(read_file(folder / kIndex), where);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    fail_request("no weight_map", where, "the index is damaged; copy the model again");
  }
  for (const auto& [name, value] : index["weight_map"].items()) {
    const auto file_name = value.is_string() ? value.get<std::string>() : "";
    if (file_name.empty() || file_name.find('/') != std::string::npos) {
      fail_request("bad shard name for '" + name + "'", where, "shards lie in the model's own folder");
    }
    places[name] = folder / file_name;
    files.try_emplace(folder / file_name, folder / file_name);
  }
  return places;
}

}  // namespace

void save_model(const LanguageModel& model, const fs::path& folder, std::size_t shard_bytes) {
  fs::create_directories(folder);
  std::vector<NamedTensors> shards(1);
  std::size_t filled = 0, total = 0;
  const at::NoGradGuard no_grad;
  for (const auto& parameter : model.parameters()) {
    const auto stored = model.to_file(parameter);
    if (filled > 0 && filled + stored.nbytes() > shard_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    filled += stored.nbytes();
    total += stored.nbytes();
    shards.back().emplace_back(parameter.name, stored);
  }
  write_file_atomically(folder / "config.json", to_json(model.config()).dump(2) + "\n");
  if (shards.size() == 1) return save_tensors(folder / kWeights, shards[0], {{"format", "pt"}});

  Json map = Json::object();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    save_tensors(folder / name, shards[i], {{"format", "pt"}});
    for (const auto& [tensor, value] : shards[i]) map[tensor] = name;
  }
  const Json index{{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  write_file_atomically(folder / kIndex, index.dump(2) + "\n");
}

void load_weights(const LanguageModel& model, const fs::path& folder) {
  std::map<fs::path, SafetensorsFile> files;
  auto places = locate(folder, files);
  const at::NoGradGuard no_grad;
  for (const auto& parameter : model.parameters()) {
    const auto place = places.find(parameter.name);
    if (place == places.end()) {
      fail_request("no tensor '" + parameter.name + "'", folder.string(),
                   "config.json and weights do not fit together");
    }
    const auto stored = read_tensor(files.at(place->second), parameter.name);
    if (stored.sizes() != parameter.value.sizes()) {
      fail_request("tensor '" + parameter.name + "' has shape " + shape_text(stored.sizes()) +
                       ", config.json asks for " + shape_text(parameter.value.sizes()),
                   place->second.string(), "config.json and weights do not fit together");
    }
    if (!stored.is_floating_point()) {
      fail_request("tensor '" + parameter.name + "' is of type " + at::toString(stored.scalar_type()),
                   place->second.string(), "weights are floating-point");
    }
    auto value = parameter.value;
    value.copy_(model.from_file(parameter, stored));
    places.erase(place);
  }
  places.erase("lm_head.weight");  // Hugging Face may store a tied output too
  if (!places.empty()) {
    fail_request("unknown tensor '" + places.begin()->first + "'", places.begin()->second.string(),
                 "config.json and weights do not fit together");
  }
}

std::unique_ptr<LanguageModel> load_model(const fs::path& folder, at::ScalarType type) {
  if (!fs::is_directory(folder))
    fail_request("no such model directory", folder.string(), "give a folder with config.json");
  const auto config = folder / "config.json";
  auto model =
      make_model(from_json(parse_json(read_file(config), config.string()), config.string()), 0, false);
  load_weights(*model, folder);
  model->set_compute_type(type);
  model->round_matrices();
  return model;
}

}  // namespace megalodon::model
