#include "model/tensor_file.h"

#include <ATen/ATen.h>

#include <array>
#include <cstring>

#include "base/error.h"

namespace megalodon::model {
namespace {
constexpr std::array<std::pair<TensorType, at::ScalarType>, 10> kTypes{{{TensorType::bool_, at::kBool},
                                                                        {TensorType::u8, at::kByte},
                                                                        {TensorType::i8, at::kChar},
                                                                        {TensorType::i16, at::kShort},
                                                                        {TensorType::i32, at::kInt},
                                                                        {TensorType::i64, at::kLong},
                                                                        {TensorType::f16, at::kHalf},
                                                                        {TensorType::bf16, at::kBFloat16},
                                                                        {TensorType::f32, at::kFloat},
                                                                        {TensorType::f64, at::kDouble}}};
}

at::ScalarType scalar_type(TensorType type) {
  for (const auto& [ours, torch] : kTypes) {
    if (ours == type) return torch;
  }
  return at::kFloat;  // all are listed
}

TensorType tensor_type(at::ScalarType type) {
  for (const auto& [ours, torch] : kTypes) {
    if (torch == type) return ours;
  }
  fail_work(std::string("tensors of type ") + at::toString(type) + " cannot be saved", "",
            "convert them first");
}

at::Tensor read_tensor(const SafetensorsFile& file, const std::string& name) {
  const auto& info = file.info(name);
  auto tensor = at::empty(info.shape, scalar_type(info.type));
  const auto bytes = file.data(name);
  if (!bytes.empty()) std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

void save_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                  const std::map<std::string, std::string>& metadata) {
  std::vector<at::Tensor> held;
  std::vector<TensorBytes> bytes;
  for (const auto& [name, tensor] : tensors) {
    held.push_back(tensor.detach().cpu().contiguous());
    const auto& t = held.back();
    bytes.push_back({name,
                     tensor_type(t.scalar_type()),
                     t.sizes().vec(),
                     {static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()}});
  }
  write_safetensors(path, bytes, metadata);
}

}  // namespace megalodon::model
