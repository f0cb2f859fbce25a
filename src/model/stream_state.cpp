#include "model/stream_state.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/error.h"
#include "model/tensor_file.h"

namespace megalodon::model {
namespace {

at::Tensor rows_tensor(const std::vector<int64_t>& rows) {
  return at::tensor(rows, at::kLong);
}

// Streams of a batch may have caches of different capacity (the baseline's): both grow to the larger.
void match_capacity(at::Tensor& a, at::Tensor& b) {
  if (a.dim() < 2 || a.size(1) == b.size(1)) return;
  auto& smaller = a.size(1) < b.size(1) ? a : b;
  const int64_t missing = std::max(a.size(1), b.size(1)) - smaller.size(1);
  std::vector<int64_t> padding(static_cast<std::size_t>(2 * (a.dim() - 1)), 0);
  padding.back() = missing;
  smaller = at::constant_pad_nd(smaller, padding);
}

}  // namespace

int64_t StreamState::bytes() const {
  int64_t total = position.numel() * 8;
  for (const auto& [name, tensor] : tensors) total += static_cast<int64_t>(tensor.nbytes());
  return total;
}

void StreamState::advance(int64_t L) {
  position = position + L;
  lowest += L;
  highest += L;
}

void StreamState::move_to(int64_t tokens) {
  position = at::full_like(position, tokens);
  lowest = highest = tokens;
}

StreamState StreamState::select(const std::vector<int64_t>& rows) const {
  StreamState chosen = *this;
  chosen.position = position.index_select(0, rows_tensor(rows).to(position.device()));
  for (const auto& [name, tensor] : tensors) {
    chosen.tensors[name] = tensor.index_select(0, rows_tensor(rows).to(tensor.device()));
  }
  return chosen;
}

StreamState StreamState::to(at::Device device) const {
  StreamState moved = *this;
  moved.position = position.to(device);
  for (const auto& [name, tensor] : tensors) moved.tensors[name] = tensor.to(device);
  return moved;
}

StreamState StreamState::fork() const {
  StreamState copy = *this;
  copy.position = position.clone();
  for (const auto& [name, tensor] : tensors) copy.tensors[name] = tensor.clone();
  return copy;
}

void StreamState::assign(const std::vector<int64_t>& rows, const StreamState& other) {
  position = position.index_copy(0, rows_tensor(rows).to(position.device()), other.position);
  lowest = std::min(lowest, other.lowest);
  highest = std::max(highest, other.highest);
  for (auto& [name, tensor] : tensors) {
    auto from = other.tensors.at(name);
    match_capacity(tensor, from);
    tensor = tensor.index_copy(0, rows_tensor(rows).to(tensor.device()), from);
  }
}

void StreamState::save(const std::filesystem::path& path) const {
  NamedTensors all(tensors.begin(), tensors.end());
  all.emplace_back("position", position);
  save_tensors(
      path, all,
      {{"format", "megalodon-stream-state"}, {"version", std::to_string(kVersion)}, {"model", model}});
}

StreamState StreamState::load(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  const auto& metadata = file.header().metadata;
  const auto field = [&](const char* key) {
    return metadata.contains(key) ? metadata.at(key) : std::string();
  };
  if (field("format") != "megalodon-stream-state") {
    fail_request("not a stream state", path.string(), "give a file that --state-out wrote");
  }
  if (field("version") != std::to_string(kVersion)) {
    fail_request("stream state of version '" + field("version") + "'", path.string(),
                 "this program reads version " + std::to_string(kVersion));
  }
  StreamState state;
  state.model = field("model");
  for (const auto& [name, info] : file.header().tensors) {
    auto tensor = read_tensor(file, name);
    if (name == "position") {
      state.position = tensor;
    } else {
      state.tensors[name] = tensor;
    }
  }
  if (!state.position.defined() || state.position.scalar_type() != at::kLong || state.position.dim() != 1) {
    fail_request("stream state without positions", path.string(), "the file is damaged; make it again");
  }
  if (state.batch() > 0) {
    state.lowest = state.position.min().item<int64_t>();
    state.highest = state.position.max().item<int64_t>();
  }
  return state;
}

}  // namespace megalodon::model
