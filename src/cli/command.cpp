#include "cli/command.h"

#include <cstdio>

#include "base/error.h"
#include "train/checkpoint.h"

namespace megalodon::cli {

void add_device(CLI::App& command, std::string& device) {
  command.add_option("--device", device, "cpu, cuda, or auto: the best there is")->default_str("auto");
}

std::filesystem::path model_folder(const std::string& path) {
  std::filesystem::path folder(path);
  if (std::filesystem::exists(folder / "config.json") || !std::filesystem::exists(folder / "checkpoints"))
    return folder;
  const auto found = train::CheckpointFolder(folder / "checkpoints", 1).latest();
  if (!found)
    fail_request("no whole checkpoint", path, "wait for the run's first, or name a model directory");
  // Of several models trained side by side, the first.
  return std::filesystem::exists(found->folder / "model-1") ? found->folder / "model-1" : found->folder;
}

void check_fits(const data::Tokenizer& tokenizer, const model::LanguageModel& model,
                const std::string& where) {
  const auto known = model::vocab_size(model.config());
  if (tokenizer.vocabulary_size() <= known) return;
  fail_request("the tokenizer has " + std::to_string(tokenizer.vocabulary_size()) + " ids, the model knows " +
                   std::to_string(known),
               where, "put the tokenizer that the model was trained with there");
}

void print_json(const Json& object) {
  std::printf("%s\n", dump_json(object).c_str());
  std::fflush(stdout);
}

}  // namespace megalodon::cli
