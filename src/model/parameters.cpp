#include "model/parameters.h"

#include <ATen/ATen.h>

#include "base/random.h"

namespace megalodon::model {

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
