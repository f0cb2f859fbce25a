#pragma once
#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace megalodon::model {

// The values of a tensor in another type, known to be out of date once the tensor was written to or has other
// memory. An optimizer writes both, and confirms the copy.
class RoundedCopy {
 public:
  // The copy, or undefined where none in `type` is up to date.
  at::Tensor of(const at::Tensor& value, at::ScalarType type) const;
  // Makes it, or brings it up to date, in the same memory where it has some.
  void update(const at::Tensor& value, at::ScalarType type);
  // The copy holds what `value` holds now.
  void confirm(const at::Tensor& value);

  bool in_float8 = false;  // products go on from there to float8

  // Memory for several copies, one after the other.
  struct Shared {
    at::Tensor memory;
    int64_t size = 0;  // elements
  };
  // Moves `value` itself into the shared memory, if there is any.
  void gather(const at::Tensor& value);
  // Copies of `size` elements are made behind those that share the memory already.
  void share(std::shared_ptr<Shared> shared, int64_t size);

 private:
  at::Tensor memory(at::IntArrayRef sizes, const at::TensorOptions& options);

  std::shared_ptr<Shared> shared_;
  int64_t first_ = 0;  // of the shared memory
  at::Tensor copy_;
  const void* address_ = nullptr;
  int64_t version_ = -1;
};

// A trained tensor, float32 while it trains.
struct Parameter {
  std::string name;
  at::Tensor value;
  bool is_matrix;  // of a matrix product or an embedding: weight decay applies, and it runs in the compute
                   // type
  std::shared_ptr<RoundedCopy> rounded = {};  // of a linear layer's
};

// Weight or bias of a linear layer, of a model's or any tensor.
class Weight {
 public:
  Weight() = default;
  Weight(at::Tensor value) : value_(std::move(value)) {}
  explicit Weight(const Parameter& parameter) : value_(parameter.value), rounded_(parameter.rounded) {}

  const at::Tensor& value() const { return value_; }
  operator const at::Tensor&() const { return value_; }
  bool defined() const { return value_.defined(); }
  // The copy in `type`, or undefined where none is kept.
  at::Tensor kept(at::ScalarType type) const { return rounded_ ? rounded_->of(value_, type) : at::Tensor(); }
  bool in_float8() const { return rounded_ && rounded_->in_float8; }
  // Its values in `type`: those kept, or a cast.
  at::Tensor in(at::ScalarType type) const;
  // The copies of matrices with as many columns, or on a GPU these in bfloat16 themselves, become one matrix
  // in memory, so that their products with the same rows can be one. Those who read the results must take
  // rows that lie further apart than they are long.
  static void lay_together(std::initializer_list<Weight> weights);
  // The same values without a gradient: for a bias whose gradient comes with that of an activation.
  Weight detached() const {
    auto same = *this;
    same.value_ = value_.detach();
    return same;
  }

 private:
  at::Tensor value_;
  std::shared_ptr<RoundedCopy> rounded_;
};

// Makes and names the parameters of a model, in order. Initial values are a function of (seed, order) alone.
class ParameterMaker {
 public:
  // The parameters of one model; with several seeds those of one model each, stacked: [K, ...]. Without
  // `initialise` the values are left for a file to fill.
  ParameterMaker(std::vector<uint64_t> seeds, bool initialise)
      : seeds_(std::move(seeds)), initialise_(initialise) {}

  // Weight [out, in], normal, and bias [out], zeros, of a linear layer.
  Weight weight(const std::string& name, at::IntArrayRef shape, double deviation);
  Weight bias(const std::string& name, at::IntArrayRef shape);
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
  Weight of_linear_layer();  // the last parameter
  at::Generator generator(uint64_t seed) const;

  std::vector<uint64_t> seeds_;
  bool initialise_;
  std::vector<Parameter> parameters_;
};

}  // namespace megalodon::model
