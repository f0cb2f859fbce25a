#pragma once
#include <ATen/ATen.h>

#include <functional>
#include <string>
#include <vector>

namespace megalodon::bench {

// One way to do the work of a comparison. prepare() makes its inputs and returns the work itself.
struct Contestant {
  std::string name;
  std::function<std::function<void()>()> prepare;
};

// The first contestant is this project's; the others are peers. Each must do the same work.
struct Comparison {
  std::string name;
  std::vector<Contestant> contestants;
};

// One function a kind of operator, in KIND_bench.cpp; ops_bench.cpp lists them.
std::vector<Comparison> attention_comparisons();  // and queries and keys
std::vector<Comparison> cema_comparisons();
std::vector<Comparison> norm_comparisons();  // and cross-entropy and dropout

// f on fresh leaves like `inputs`, and the gradients of its first output for an upstream gradient of ones.
std::function<void()> forward_backward(std::function<at::Tensor(const std::vector<at::Tensor>&)> f,
                                       const std::vector<at::Tensor>& inputs);

}  // namespace megalodon::bench
