#include "ops/cross_entropy/cross_entropy.h"
#include "ops/dropout/dropout.h"
#include "ops/layer_norm/layer_norm.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/timestep_norm/timestep_norm.h"
#include "ops_bench.h"

namespace megalodon::bench {
namespace {
using Tensors = std::vector<at::Tensor>;
using Function = std::function<at::Tensor(const Tensors&)>;

// Normal x of `shape` and `vectors` parameters as long as its last dimension; theirs is float32 in this
// project, and x's type in torch's own operators.
Tensors inputs(const std::vector<int64_t>& shape, at::ScalarType type, int vectors,
               at::ScalarType of_vectors) {
  Tensors in{at::randn(shape).to(type)};
  for (int i = 0; i < vectors; ++i) in.push_back(at::randn({shape.back()}).to(of_vectors));
  return in;
}

Contestant training(const std::string& name, const Function& f, const std::vector<int64_t>& shape,
                    at::ScalarType type, int vectors, at::ScalarType of_vectors = at::kFloat) {
  return {name, [=] { return forward_backward(f, inputs(shape, type, vectors, of_vectors)); }};
}

ops::TimestepNormState fresh(int64_t B, int64_t G) {
  return {at::zeros({B}, at::kLong), at::zeros({B, G}), at::ones({B, G})};
}

Comparison timestep_norm(const std::string& size, const std::vector<int64_t>& shape, at::ScalarType type) {
  const auto state = fresh(shape[0], 32);
  return {
      "timestep_norm forward+backward " + size,
      {training(
           "megalodon", [=](const Tensors& in) { return ops::timestep_norm(in[0], in[1], in[2], state).y; },
           shape, type, 2),
       training(
           "plain",
           [=](const Tensors& in) { return ops::timestep_norm_reference(in[0], in[1], in[2], state).y; },
           shape, type, 2)}};
}

Comparison timestep_norm_step() {
  const auto step = [](const std::string& name, auto f) {
    return Contestant{name, [=]() -> std::function<void()> {
                        return
                            [in = inputs({1, 1, 2048}, at::kFloat, 2, at::kFloat), state = fresh(1, 64), f] {
                              const at::NoGradGuard no_gradients;
                              f(in[0], in[1], in[2], state);
                            };
                      }};
  };
  return {"timestep_norm step [1,1,2048] float32",
          {step("megalodon", [](const auto&... a) { return ops::timestep_norm(a...); }),
           step("plain", [](const auto&... a) { return ops::timestep_norm_reference(a...); })}};
}

Comparison rms_norm(const std::string& size, const std::vector<int64_t>& shape, at::ScalarType type) {
  return {
      "rms_norm forward+backward " + size,
      {training(
           "megalodon", [](const Tensors& in) { return ops::rms_norm(in[0], in[1]); }, shape, type, 1),
       training(
           "plain", [](const Tensors& in) { return ops::rms_norm_reference(in[0], in[1]); }, shape, type, 1),
       training(
           "at::rms_norm", [](const Tensors& in) { return at::rms_norm(in[0], in[1].sizes(), in[1], 1e-5); },
           shape, type, 1, type)}};
}

Comparison layer_norm(const std::string& size, const std::vector<int64_t>& shape, at::ScalarType type) {
  return {"layer_norm forward+backward " + size,
          {training(
               "megalodon", [](const Tensors& in) { return ops::layer_norm(in[0], in[1], in[2]); }, shape,
               type, 2),
           training(
               "plain", [](const Tensors& in) { return ops::layer_norm_reference(in[0], in[1], in[2]); },
               shape, type, 2),
           training(
               "at::layer_norm",
               [](const Tensors& in) { return at::layer_norm(in[0], in[1].sizes(), in[1], in[2], 1e-5); },
               shape, type, 2, type)}};
}

Comparison cross_entropy(const std::string& size, int64_t T, int64_t V) {
  const auto targets = at::randint(V, {T}, at::kLong);
  const auto none = static_cast<int64_t>(at::Reduction::None);
  return {"cross_entropy forward+backward " + size,
          {training(
               "megalodon", [=](const Tensors& in) { return ops::cross_entropy(in[0], targets); }, {T, V},
               at::kFloat, 0),
           training(
               "plain", [=](const Tensors& in) { return ops::cross_entropy_reference(in[0], targets); },
               {T, V}, at::kFloat, 0),
           training(
               "at::cross_entropy_loss",
               [=](const Tensors& in) { return at::cross_entropy_loss(in[0], targets, {}, none); }, {T, V},
               at::kFloat, 0)}};
}

Comparison dropout(const std::string& size, const std::vector<int64_t>& shape) {
  constexpr int64_t key = 1;
  return {"dropout forward+backward " + size,
          {training(
               "megalodon", [](const Tensors& in) { return ops::dropout(in[0], 0.1, key); }, shape,
               at::kFloat, 0),
           training(
               "at::dropout", [](const Tensors& in) { return at::dropout(in[0], 0.1, true); }, shape,
               at::kFloat, 0)}};
}

}  // namespace

std::vector<Comparison> norm_comparisons() {
  const std::vector<int64_t> large{4, 4096, 512}, small{4, 2048, 384};
  return {
      timestep_norm("[4,4096,512] float32", large, at::kFloat),
      timestep_norm("[4,4096,512] bfloat16", large, at::kBFloat16),
      timestep_norm("[4,2048,384] float32", small, at::kFloat),
      timestep_norm_step(),
      rms_norm("[4,4096,512] float32", large, at::kFloat),
      rms_norm("[4,4096,512] bfloat16", large, at::kBFloat16),
      layer_norm("[4,4096,512] float32", large, at::kFloat),
      layer_norm("[4,4096,512] bfloat16", large, at::kBFloat16),
      cross_entropy("[8192,256] float32", 8192, 256),
      cross_entropy("[512,32000] float32", 512, 32000),
      dropout("[4,4096,512] float32", large),
  };
}

}  // namespace megalodon::bench
