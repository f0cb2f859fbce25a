#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace megalodon::model {

// A trained tensor, float32 while it trains.
struct Parameter {
  std::string name;
  at::Tensor value;
  bool is_matrix;  // of a matrix product or an embedding: weight decay applies, and it runs in the compute
                   // type
};

// Makes and names the parameters of a model, in order. Initial values are a function of (seed, order) alone.
class ParameterMaker {
 public:
  // The parameters of one model; with several seeds those of one model each, stacked: [K, ...]. Without
  // `initialise` the values are left for a file to fill.
  ParameterMaker(std::vector<uint64_t> seeds, bool initialise)
      : seeds_(std::move(seeds)), initialise_(initialise) {}

  at::Tensor constant(const std::string& name, at::IntArrayRef shape, double value);
  at::Tensor normal(const std::string& name, at::IntArrayRef shape, double deviation);
  at::Tensor truncated_normal(const std::string& name, at::IntArrayRef shape, double deviation, double bound);
  // `make(generator)` draws the initial value of one model.
  template <class Make>
  at::Tensor custom(const std::string& name, at::IntArrayRef shape, const Make& make) {
    const auto value = add(name, shape);
    for (std::size_t k = 0; initialise_ && k < seeds_.size(); ++k) {
      (seeds_.size() == 1 ? value : value[static_cast<int64_t>(k)]).copy_(make(generator(seeds_[k])));
    }
    return parameters_.back().value.set_requires_grad(true);
  }

  std::vector<Parameter> take() { return std::move(parameters_); }

 private:
  at::Tensor add(const std::string& name, at::IntArrayRef shape);
  at::Generator generator(uint64_t seed) const;

  std::vector<uint64_t> seeds_;
  bool initialise_;
  std::vector<Parameter> parameters_;
};

}  // namespace megalodon::model
