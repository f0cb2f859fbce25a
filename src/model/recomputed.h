#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace megalodon::model {

// What a block's backward pass computes again instead of keeping: results of cheap functions that its
// products need. The block adds them where it computes them, and passes its own result through
// until_gradient() last: their memory is given back there, and filled again when the gradient of the result
// arrives, before any operator of the block needs it. Where no gradient is wanted nothing happens.
class Recomputed {
 public:
  // `recomputes`: false keeps everything.
  explicit Recomputed(bool recomputes = true) : recomputes_(recomputes) {}
  // f(), which gives the same whenever it is called: a new tensor, computed from tensors that the block keeps
  // anyway or that were added before.
  at::Tensor add(const std::function<at::Tensor()>& f);
  // The same, with f() computed already.
  void add(const at::Tensor& value, const std::function<at::Tensor()>& f);
  // The same of several results of one call, always as many.
  std::vector<at::Tensor> add(const std::function<std::vector<at::Tensor>()>& f);
  // y itself, on which everything that was added has its only effect.
  at::Tensor until_gradient(const at::Tensor& y);

 private:
  struct Results {
    std::vector<at::Tensor> values;
    std::function<std::vector<at::Tensor>()> again;
  };
  struct Refill;

  void note(const std::vector<at::Tensor>& values, const std::function<std::vector<at::Tensor>()>& again);

  bool recomputes_;
  std::vector<Results> results_;
};

}  // namespace megalodon::model
