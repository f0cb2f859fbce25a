#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/device_graph.h"

// Part of the CUDA plugin.
namespace megalodon::ops {
namespace {

class CudaGraph : public DeviceGraph {
 public:
  void record(at::Device device, const std::function<void()>& f, const CudaGraph* neighbour) {
    // Recording needs a stream of its own; all work so far comes before it.
    const auto stream = c10::cuda::getStreamFromPool(false, device.index());
    c10::cuda::device_synchronize();
    const c10::cuda::CUDAStreamGuard guard(stream);
    const auto own = at::cuda::MempoolId_t{0, 0};
    graph_.capture_begin(neighbour == nullptr ? own : neighbour->pool_, cudaStreamCaptureModeThreadLocal);
    pool_ = graph_.pool();
    try {
      f();
    } catch (...) {
      try {
        graph_.capture_end();
      } catch (const c10::Error&) {  // of what made f fail
      }
      throw;
    }
    graph_.capture_end();
  }
  void replay() override { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
  at::cuda::MempoolId_t pool_;
};

}  // namespace
}  // namespace megalodon::ops

extern "C" __attribute__((visibility("default"))) megalodon::ops::DeviceGraph* megalodon_record_cuda_graph(
    at::Device device, const std::function<void()>& f, const megalodon::ops::DeviceGraph* neighbour) {
  auto graph = std::make_unique<megalodon::ops::CudaGraph>();
  graph->record(device, f, static_cast<const megalodon::ops::CudaGraph*>(neighbour));
  return graph.release();
}
