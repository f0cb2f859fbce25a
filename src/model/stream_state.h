#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace megalodon::model {

// The whole history of B streams: what a model needs to go on reading. Its size does not grow with the
// position for Megalodon; for the Llama baseline it holds all keys and values. A copy of the struct shares
// its tensors: fork() copies.
struct StreamState {
  static constexpr int64_t kVersion = 1;

  std::string model;                          // fingerprint of the configuration it belongs to
  at::Tensor position;                        // [B] int64: tokens read by each stream
  std::map<std::string, at::Tensor> tensors;  // "LAYER.name" or "name", each [B, ...]
  // Bounds of the positions: known without waiting for the device that holds them.
  int64_t lowest = 0, highest = 0;

  int64_t batch() const { return position.size(0); }
  at::Tensor& layer(int64_t index, const std::string& name) {
    return tensors.at(std::to_string(index) + "." + name);
  }
  int64_t bytes() const;

  // The position of all streams, where it is known to be one.
  std::optional<int64_t> common_position() const {
    return lowest == highest ? std::optional(lowest) : std::nullopt;
  }
  // Of tensors that hold keys or values.
  static bool is_cache(const std::string& name) { return name.ends_with(".k") || name.ends_with(".v"); }

  // Every stream has read L tokens more.
  void advance(int64_t L);
  // Every stream is said to have read so many tokens.
  void move_to(int64_t tokens);

  // The streams `rows`, in that order and as often as named, as an independent state.
  StreamState select(const std::vector<int64_t>& rows) const;
  StreamState fork() const;
  StreamState to(at::Device device) const;
  // Replaces the streams `rows` by those of `other`.
  void assign(const std::vector<int64_t>& rows, const StreamState& other);

  // A safetensors file, written atomically. load() refuses files of another model, version or shape: request
  // errors.
  void save(const std::filesystem::path& path) const;
  static StreamState load(const std::filesystem::path& path);
};

}  // namespace megalodon::model
