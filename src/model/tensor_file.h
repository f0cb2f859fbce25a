#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/safetensors.h"

namespace megalodon::model {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

at::ScalarType scalar_type(TensorType type);
TensorType tensor_type(at::ScalarType type);

// A tensor of its own memory.
at::Tensor read_tensor(const SafetensorsFile& file, const std::string& name);

// Writes CPU copies of the tensors, atomically.
void save_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                  const std::map<std::string, std::string>& metadata = {});

}  // namespace megalodon::model
