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
  // Without `initialise` the values are left for a file to fill.
  ParameterMaker(uint64_t seed, bool initialise) : seed_(seed), initialise_(initialise) {}

  at::Tensor constant(const std::string& name, at::IntArrayRef shape, double value);
  at::Tensor normal(const std::string& name, at::IntArrayRef shape, double deviation);
  at::Tensor truncated_normal(const std::string& name, at::IntArrayRef shape, double deviation, double bound);
  // `make(generator)` draws the initial value.
  template <class Make>
  at::Tensor custom(const std::string& name, at::IntArrayRef shape, const Make& make) {
    const auto value = add(name, shape);
    if (initialise_) value.copy_(make(generator()));
    return parameters_.back().value.set_requires_grad(true);
  }

  std::vector<Parameter> take() { return std::move(parameters_); }

 private:
  at::Tensor add(const std::string& name, at::IntArrayRef shape);
  at::Generator generator() const;

  uint64_t seed_;
  bool initialise_;
  std::vector<Parameter> parameters_;
};

}  // namespace megalodon::model
