#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <variant>
#include <vector>

#include "ops/attention_step/cuda.h"
#include "ops/norm_cema_step/cuda.h"
#include "ops/skinny_linear/cuda.h"

// The kernels of a decoding step as one: a block on each multiprocessor goes through all of them, and its
// copy engine brings the weights of the next ones while it waits for the other blocks.
namespace megalodon::ops::cuda {

using StepCall = std::variant<SkinnyCall, AttentionStep<Bfloat16>, NormCemaStep<Bfloat16>>;

// Calls that follow each other, each of which may read what those before it wrote.
class StepProgram {
 public:
  // Whether a program may have the call: few rows, on a Hopper GPU.
  static bool takes(const StepCall& call);

  explicit StepProgram(std::vector<StepCall> calls);
  // Of device memory, which must stay as long as the program is run, by one stream at a time.
  std::size_t bytes() const;
  // The kernel that runs the program, in a graph behind some of its nodes. Fills the memory.
  cudaError_t add(cudaGraph_t graph, const std::vector<cudaGraphNode_t>& behind, void* memory,
                  cudaGraphNode_t* node) const;

 private:
  std::vector<StepCall> calls_;
  std::size_t layers_ = 0, phases_ = 0, float_words_ = 0, words_ = 0;  // that lie in the memory
};

// While there is one, it notes what this thread adds to the graph that is being recorded.
class StepRecorder {
 public:
  struct Call {
    StepCall call;
    cudaGraphNode_t node;
  };
  StepRecorder();
  ~StepRecorder();
  StepRecorder(const StepRecorder&) = delete;
  StepRecorder& operator=(const StepRecorder&) = delete;
  const std::vector<Call>& calls() const { return calls_; }

 private:
  friend void note_call(const StepCall& call, cudaStream_t stream);
  std::vector<Call> calls_;
};
// Of a call whose kernel was just launched.
void note_call(const StepCall& call, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
