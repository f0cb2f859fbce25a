#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "base/json.h"

namespace megalodon::train {

// RUN/checkpoints/step-N: a folder that appears whole or not at all. Its files are written aside and fsynced,
// then manifest.json with their sizes and hashes, then the folder is renamed into place.
class CheckpointFolder {
 public:
  explicit CheckpointFolder(std::filesystem::path checkpoints, int64_t keep);

  // `write` fills the folder that it is given. Then older checkpoints beyond `keep` go. A failure (disk full)
  // leaves the older ones alone and is a work error.
  void save(int64_t step, const std::function<void(const std::filesystem::path&)>& write) const;

  struct Found {
    std::filesystem::path folder;
    int64_t step;
  };
  // The newest whole checkpoint; damaged ones are passed over with a warning that names what is wrong.
  std::optional<Found> latest() const;

 private:
  std::filesystem::path root_;
  int64_t keep_;
};

// What is wrong with a checkpoint, or "" where every file has the size and hash of its manifest.
std::string damage_of(const std::filesystem::path& checkpoint);

}  // namespace megalodon::train
