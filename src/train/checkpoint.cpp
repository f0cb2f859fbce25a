#include "train/checkpoint.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"

namespace megalodon::train {
namespace {
namespace fs = std::filesystem;

const char kManifest[] = "manifest.json";
const char kPrefix[] = "step-";

std::vector<CheckpointFolder::Found> newest_first(const fs::path& root) {
  std::vector<CheckpointFolder::Found> found;
  if (!fs::is_directory(root)) return found;
  for (const auto& entry : fs::directory_iterator(root)) {
    const auto name = entry.path().filename().string();
    const auto digits = name.substr(std::min(name.size(), sizeof kPrefix - 1));
    if (!name.starts_with(kPrefix) || digits.empty() || digits.size() > 18) continue;
    if (digits.find_first_not_of("0123456789") != std::string::npos) continue;
    found.push_back({entry.path(), std::stoll(digits)});
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.step > b.step; });
  return found;
}

}  // namespace

CheckpointFolder::CheckpointFolder(fs::path checkpoints, int64_t keep)
    : root_(std::move(checkpoints)), keep_(keep) {}

void CheckpointFolder::save(int64_t step, const std::function<void(const fs::path&)>& write) const {
  const auto target = root_ / (kPrefix + std::to_string(step)),
             aside = root_ / (".partial-" + std::to_string(step));
  try {
    fs::create_directories(root_);
    fs::remove_all(aside);
    fs::create_directory(aside);
    write(aside);
    Json files = Json::object();
    for (const auto& entry : fs::recursive_directory_iterator(aside)) {
      if (!entry.is_regular_file()) continue;
      files[fs::relative(entry.path(), aside).string()] = {{"bytes", entry.file_size()},
                                                           {"xxh3", hex(xxh3_of_file(entry.path()))}};
    }
    write_file_atomically(aside / kManifest, Json{{"step", step}, {"files", files}}.dump(2) + "\n");
    fs::remove_all(target);
    rename_durably(aside, target);
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    if (dynamic_cast<const Error*>(&error) != nullptr) throw;
    fail_work("the checkpoint cannot be written", root_.string(), error.what());
  }
  const auto all = newest_first(root_);
  for (std::size_t i = static_cast<std::size_t>(keep_); i < all.size(); ++i) fs::remove_all(all[i].folder);
}

std::optional<CheckpointFolder::Found> CheckpointFolder::latest() const {
  for (const auto& found : newest_first(root_)) {
    const auto damage = damage_of(found.folder);
    if (damage.empty()) return found;
    log_warning("checkpoint " + found.folder.string() + " is damaged (" + damage + "): using the one before");
  }
  return std::nullopt;
}

std::string damage_of(const fs::path& checkpoint) {
  try {
    const auto path = checkpoint / kManifest;
    const auto manifest = parse_json(read_file(path), path.string());
    if (!manifest.is_object() || !manifest.contains("files") || !manifest["files"].is_object())
      return "bad manifest";
    for (const auto& [name, entry] : manifest["files"].items()) {
      const auto file = checkpoint / name;
      if (!fs::is_regular_file(file)) return name + " is missing";
      if (static_cast<int64_t>(fs::file_size(file)) != json_member<int64_t>(entry, "bytes", path.string()))
        return name + " has another size";
      if (hex(xxh3_of_file(file)) != json_member<std::string>(entry, "xxh3", path.string()))
        return name + " has another hash";
    }
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace megalodon::train
