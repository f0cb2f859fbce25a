#include "ops/device.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string_view>

#include "base/error.h"
#include "ops/device_graph.h"

namespace megalodon::ops {
namespace {
namespace fs = std::filesystem;

constexpr std::string_view kPlugin = "libmegalodon_cuda.so";

// The folder of the torch libraries that this process runs on.
fs::path torch_folder() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&at::globalContext), &info);
  return fs::path(info.dli_fname).parent_path();
}

fs::path plugin_path() {
  const auto folder = fs::read_symlink("/proc/self/exe").parent_path();
  for (const auto& path : {folder / kPlugin, folder.parent_path() / "lib" / kPlugin}) {
    if (fs::exists(path)) return path;
  }
  return {};
}

// Why there is no CUDA device; empty where there is one. Torch's CUDA half comes first: it finds the CUDA
// libraries that belong to it, and the plugin then takes those.
std::string load() {
  const auto plugin = plugin_path();
  if (plugin.empty()) return std::string(kPlugin).append(" is not beside the program");
  for (const auto& library : {torch_folder() / "libtorch_cuda.so", plugin}) {
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) return dlerror();
  }
  return at::globalContext().hasCUDA() ? "" : "no GPU, or no driver for it";
}

const std::string& missing_cuda() {
  static const std::string why = load();
  return why;
}

}  // namespace

at::Device open_device(const std::string& wanted) {
  if (wanted == "cpu") return at::kCPU;
  if (wanted == "cuda") {
    if (missing_cuda().empty()) return at::Device(at::kCUDA, 0);
    fail_request("no CUDA device: " + missing_cuda(), "--device cuda",
                 "build with the preset cuda and run where a GPU is, or use --device cpu");
  }
  if (!wanted.empty() && wanted != "auto")
    fail_request("unknown device '" + wanted + "'", "--device", "use cpu, cuda or auto");
  return missing_cuda().empty() ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
}

void make_deterministic() {
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  auto& context = at::globalContext();
  context.setDeterministicAlgorithms(true, /*warn_only=*/false);
  context.setDeterministicFillUninitializedMemory(false);
}

void expect_changing_sizes() {
  setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", /*overwrite=*/0);
}

void synchronize(at::Device device) {
  if (device.is_cuda()) c10::impl::getDeviceGuardImpl(device.type())->synchronizeDevice(device.index());
}

int64_t peak_device_bytes(at::Device device) {
  const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  return stats.allocated_bytes[static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
}

std::unique_ptr<DeviceGraph> DeviceGraph::record(at::Device device, const std::function<void()>& f,
                                                 const DeviceGraph* neighbour) {
  using Record = DeviceGraph* (*)(at::Device, const std::function<void()>&, const DeviceGraph*);
  static const auto record = reinterpret_cast<Record>(dlsym(RTLD_DEFAULT, "megalodon_record_cuda_graph"));
  TORCH_CHECK(device.is_cuda() && record != nullptr,
              "DeviceGraph: expected a CUDA device and the plugin, got ", device);
  return std::unique_ptr<DeviceGraph>(record(device, f, neighbour));
}

bool has_cuda_kernels() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("megalodon::cema", "");
  return op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

}  // namespace megalodon::ops
