#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "ops/device_graph.h"
#include "ops/step_program/cuda.h"

// Part of the CUDA plugin.
namespace megalodon::ops {
namespace {
using Nodes = std::vector<cudaGraphNode_t>;

template <class Query>
Nodes neighbours_of(cudaGraphNode_t node, Query query) {
  std::size_t count = 0;
  C10_CUDA_CHECK(query(node, nullptr, nullptr, &count));
  Nodes nodes(count);
  std::vector<cudaGraphEdgeData> edges(count);
  if (count > 0) C10_CUDA_CHECK(query(node, nodes.data(), edges.data(), &count));
  return nodes;
}
Nodes before(cudaGraphNode_t node) {
  return neighbours_of(node, cudaGraphNodeGetDependencies);
}
Nodes behind(cudaGraphNode_t node) {
  return neighbours_of(node, cudaGraphNodeGetDependentNodes);
}

using Calls = std::vector<cuda::StepRecorder::Call>;

// Calls of which each is all that the next one waits for.
std::vector<Calls> rows_of(const Calls& calls) {
  std::vector<Calls> rows;
  for (const auto& call : calls) {
    const bool goes_on = !rows.empty() && before(call.node) == Nodes{rows.back().back().node} &&
                         behind(rows.back().back().node) == Nodes{call.node};
    if (!goes_on) rows.emplace_back();
    rows.back().push_back(call);
  }
  return rows;
}

// One kernel in place of theirs; returns the memory that it uses.
at::Tensor join(cudaGraph_t graph, const Calls& calls, at::Device device) {
  std::vector<cuda::StepCall> of_program;
  for (const auto& call : calls) of_program.push_back(call.call);
  const cuda::StepProgram program(of_program);
  const auto memory = at::empty({static_cast<int64_t>(program.bytes())}, at::device(device).dtype(at::kByte));
  cudaGraphNode_t node = nullptr;
  C10_CUDA_CHECK(program.add(graph, before(calls.front().node), memory.mutable_data_ptr(), &node));
  for (const auto next : behind(calls.back().node))
    C10_CUDA_CHECK(cudaGraphAddDependencies(graph, &node, &next, nullptr, 1));
  for (const auto& call : calls) C10_CUDA_CHECK(cudaGraphDestroyNode(call.node));
  return memory;
}

class CudaGraph : public DeviceGraph {
 public:
  // Recording needs a stream of its own. Freed memory is reused on its stream alone: neighbours share that
  // too.
  CudaGraph(at::Device device, const CudaGraph* neighbour)
      : stream_(neighbour == nullptr ? c10::cuda::getStreamFromPool(false, device.index())
                                     : neighbour->stream_),
        graph_(/*keep_graph=*/true),
        pool_(neighbour == nullptr ? at::cuda::MempoolId_t{0, 0} : neighbour->pool_) {}

  void record(const std::function<void()>& f) {
    c10::cuda::device_synchronize();  // all work so far comes before it
    const c10::cuda::CUDAStreamGuard guard(stream_);
    const cuda::StepRecorder recorder;
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
    const auto graph = graph_.raw_cuda_graph();
    for (const auto& row : rows_of(recorder.calls()))
      if (row.size() > 1) programs_.push_back(join(graph, row, stream_.device()));
    C10_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &launches_));
    graph_.instantiate();
  }
  void replay() override { graph_.replay(); }
  std::size_t launches() const override { return launches_; }

 private:
  c10::cuda::CUDAStream stream_;
  at::cuda::CUDAGraph graph_;
  at::cuda::MempoolId_t pool_;
  std::vector<at::Tensor> programs_;
  std::size_t launches_ = 0;
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
