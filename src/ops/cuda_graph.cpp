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
  // Recording needs a stream of its own. Freed memory is reused on its stream alone: neighbours share that
  // too.
  CudaGraph(at::Device device, const CudaGraph* neighbour)
      : stream_(neighbour == nullptr ? c10::cuda::getStreamFromPool(false, device.index())
                                     : neighbour->stream_),
        pool_(neighbour == nullptr ? at::cuda::MempoolId_t{0, 0} : neighbour->pool_) {}

  void record(const std::function<void()>& f) {
    c10::cuda::device_synchronize();  // all work so far comes before it
    const c10::cuda::CUDAStreamGuard guard(stream_);
    graph_.capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
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
    pool_ = graph_.pool();
  }
  void replay() override { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
  c10::cuda::CUDAStream stream_;
  at::cuda::MempoolId_t pool_;
};

}  // namespace
}  // namespace megalodon::ops

extern "C" __attribute__((visibility("default"))) megalodon::ops::DeviceGraph* megalodon_record_cuda_graph(
    at::Device device, const std::function<void()>& f, const megalodon::ops::DeviceGraph* neighbour) {
  auto graph = std::make_unique<megalodon::ops::CudaGraph>(
      device, static_cast<const megalodon::ops::CudaGraph*>(neighbour));
  graph->record(f);
  return graph.release();
}
