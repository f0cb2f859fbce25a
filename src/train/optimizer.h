#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "base/config.h"
#include "model/parameters.h"
#include "model/tensor_file.h"
#include "ops/adamw/adamw.h"

namespace megalodon::train {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;  // on matrices alone, decoupled (Loshchilov and Hutter, 2019)
  double clip = 1.0;          // bound on the norm of all gradients together; 0: none
};

AdamWOptions read_optimizer(Config& config);

// AdamW over float32 parameters, clipping included: one pass over the gradients for the norm, one for the
// update. The parameters of `stack` > 1 models, stacked [K, ...], are clipped model by model.
class AdamW {
 public:
  AdamW(const std::vector<model::Parameter>& parameters, AdamWOptions options, int64_t stack = 1);

  // The norm of all gradients of each model together, before clipping: [K] float64.
  at::Tensor gradient_norms() const;
  // Updates by the gradients scaled to the clip bound, unless the truth value `skipped` holds, and clears
  // them. Copies of rounded weights that are up to date stay so. `norms` are gradient_norms(); rate is a
  // number, float64 on a CPU and float32 on other devices. All stays on the parameters' device, which is not
  // waited for.
  void step(const at::Tensor& rate, const at::Tensor& norms, const at::Tensor& skipped);
  // Raises the version of all parameters, as a step does: for one that was recorded and is replayed. What was
  // derived from weights is known by it to be out of date, but for what the step wrote itself.
  void announce_change() const;

  // First and second moments and the number of steps, by parameter name: what a checkpoint keeps.
  model::NamedTensors state() const;
  void load(const SafetensorsFile& file);

 private:
  struct Group : ops::AdamWTensors {
    std::vector<std::string> names;
    std::vector<std::shared_ptr<model::RoundedCopy>> copies;
    double weight_decay;
  };

  AdamWOptions options_;
  int64_t stack_;
  std::vector<Group> groups_;  // decayed, not decayed
};

}  // namespace megalodon::train
