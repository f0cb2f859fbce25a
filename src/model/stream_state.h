#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
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

  int64_t batch() const { return position.size(0); }
  at::Tensor& layer(int64_t index, const std::string& name) {
    return tensors.at(std::to_string(index) + "." + name);
  }
  int64_t bytes() const;

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
