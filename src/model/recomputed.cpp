#include "model/recomputed.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <utility>

namespace megalodon::model {
namespace {

// All tensors that share the storage of `x`, those that operators keep too, have other memory from here on.
void set_memory(const at::Tensor& x, at::DataPtr memory, std::size_t bytes) {
  const auto& storage = x.storage();
  storage.set_data_ptr_noswap(std::move(memory));
  storage.set_nbytes(bytes);
}

at::DataPtr no_memory(const at::Tensor& x) {
  return {nullptr, x.device()};
}

}  // namespace

// The identity; its backward pass is the first of the block's.
struct Recomputed::Refill : torch::autograd::Node {
  std::vector<Results> results;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const at::NoGradGuard no_grad;
    for (const auto& [values, again] : results) {
      const auto anew = again();
      for (std::size_t i = 0; i < values.size(); ++i) {
        const auto bytes = anew[i].storage().nbytes();
        set_memory(values[i], anew[i].storage().set_data_ptr(no_memory(anew[i])), bytes);
      }
    }
    return std::move(gradients);
  }
  void release_variables() override { results.clear(); }
};

at::Tensor Recomputed::add(const std::function<at::Tensor()>& f) {
  return add([f] { return std::vector{f()}; })[0];
}

void Recomputed::add(const at::Tensor& value, const std::function<at::Tensor()>& f) {
  note({value}, [f] { return std::vector{f()}; });
}

std::vector<at::Tensor> Recomputed::add(const std::function<std::vector<at::Tensor>()>& f) {
  auto values = f();
  note(values, f);
  return values;
}

void Recomputed::note(const std::vector<at::Tensor>& values,
                      const std::function<std::vector<at::Tensor>()>& again) {
  if (!recomputes_ || !at::GradMode::is_enabled() || !values[0].requires_grad()) return;
  results_.push_back({{}, again});
  for (const auto& value : values) results_.back().values.push_back(value.detach());
}

at::Tensor Recomputed::until_gradient(const at::Tensor& y) {
  if (results_.empty()) return y;
  for (const auto& result : results_)
    for (const auto& value : result.values) set_memory(value, no_memory(value), 0);
  const std::shared_ptr<Refill> refill(new Refill, torch::autograd::deleteNode);
  refill->results = std::move(results_);
  refill->set_next_edges(torch::autograd::collect_next_edges(y));
  auto same = y.detach();
  torch::autograd::create_gradient_edge(same, refill);
  return same;
}

}  // namespace megalodon::model
