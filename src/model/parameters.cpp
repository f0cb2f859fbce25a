#include "model/parameters.h"

#include <ATen/ATen.h>

#include "base/random.h"

namespace megalodon::model {

at::Tensor RoundedCopy::of(const at::Tensor& value, at::ScalarType type) const {
  const bool current = copy_.defined() && copy_.scalar_type() == type && address_ == value.const_data_ptr() &&
                       version_ == value._version();
  return current ? copy_ : at::Tensor();
}

void RoundedCopy::update(const at::Tensor& value, at::ScalarType type) {
  if (of(value, type).defined()) return;
  const auto options = value.options().dtype(type).requires_grad(false);
  if (!copy_.defined() || copy_.scalar_type() != type || copy_.device() != value.device())
    copy_ = memory(value.sizes(), options);
  copy_.copy_(value.detach());
  confirm(value);
}

at::Tensor RoundedCopy::memory(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!shared_) return at::empty(sizes, options);
  auto& whole = shared_->memory;
  if (!whole.defined() || whole.dtype() != options.dtype() || whole.device() != options.device())
    whole = at::empty({shared_->size}, options);
  return whole.narrow(0, first_, c10::multiply_integers(sizes)).view(sizes);
}

void RoundedCopy::gather(const at::Tensor& value) {
  if (!shared_) return;
  const auto own = memory(value.sizes(), value.options());
  own.copy_(value);
  value.set_data(own);
}

void RoundedCopy::share(std::shared_ptr<Shared> shared, int64_t size) {
  shared_ = std::move(shared);
  first_ = std::exchange(shared_->size, shared_->size + size);
}

void RoundedCopy::confirm(const at::Tensor& value) {
  address_ = value.const_data_ptr();
  version_ = value._version();
}

at::Tensor Weight::in(at::ScalarType type) const {
  const auto copy = value_.scalar_type() == type ? value_ : kept(type);
  return copy.defined() ? copy : value_.to(type);
}

void Weight::lay_together(std::initializer_list<Weight> weights) {
  const auto shared = std::make_shared<RoundedCopy::Shared>();
  for (const auto& weight : weights) weight.rounded_->share(shared, weight.value_.numel());
}

at::Tensor ParameterMaker::add(const std::string& name, at::IntArrayRef shape) {
  auto whole = shape.vec();
  if (seeds_.size() > 1) whole.insert(whole.begin(), static_cast<int64_t>(seeds_.size()));
  parameters_.push_back({name, at::empty(whole, at::kFloat), shape.size() == 2 && name.ends_with(".weight")});
  return parameters_.back().value;
}

at::Generator ParameterMaker::generator(uint64_t seed) const {
  Random random(seed, Purpose::initialisation, parameters_.size());
  return at::detail::createCPUGenerator((uint64_t{random.next()} << 32) | random.next());
}

Weight ParameterMaker::of_linear_layer() {
  parameters_.back().rounded = std::make_shared<RoundedCopy>();
  return Weight(parameters_.back());
}

Weight ParameterMaker::weight(const std::string& name, at::IntArrayRef shape, double deviation) {
  normal(name, shape, deviation);
  return of_linear_layer();
}

Weight ParameterMaker::bias(const std::string& name, at::IntArrayRef shape) {
  constant(name, shape, 0);
  return of_linear_layer();
}

at::Tensor ParameterMaker::constant(const std::string& name, at::IntArrayRef shape, double value) {
  return custom(name, shape, [&](const at::Generator&) { return at::full(shape, value); });
}

at::Tensor ParameterMaker::normal(const std::string& name, at::IntArrayRef shape, double deviation) {
  return custom(name, shape, [&](const at::Generator& g) { return at::randn(shape, g) * deviation; });
}

at::Tensor ParameterMaker::truncated_normal(const std::string& name, at::IntArrayRef shape, double deviation,
                                            double bound) {
  return custom(name, shape, [&](const at::Generator& g) {
    // The normal distribution between the bounds, through its inverse: x = sqrt(2) erfinv(u).
    const double limit = std::erf(bound / deviation / std::sqrt(2.0));
    const auto u = at::rand(shape, g, at::kDouble) * (2 * limit) - limit;
    return (at::erfinv(u) * (std::sqrt(2.0) * deviation)).clamp(-bound, bound);
  });
}

}  // namespace megalodon::model
