#include "golden.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
#include <filesystem>
#include <numbers>

#include "model/gated_attention.h"
#include "ops/cema/cema.h"
#include "ops/timestep_norm/timestep_norm.h"

namespace megalodon::golden {
namespace {
namespace fs = std::filesystem;

constexpr double kNorm = 1e-6, kCemaOutput = 5e-6, kCemaGradient = 1e-5, kCemaAngle = 3e-5;

at::Tensor leaf(const SafetensorsFile& file, const std::string& name) {
  return read_tensor(file, name).set_requires_grad(true);
}

Errors check_timestep_norm(const SafetensorsFile& file) {
  const auto& metadata = file.header().metadata;
  const int64_t G = std::stoll(metadata.at("groups"));
  const auto x = leaf(file, "x"), weight = leaf(file, "weight"), bias = leaf(file, "bias");
  const int64_t B = x.size(0);
  const bool carried = file.has("prev_mean");
  const auto mean = carried ? leaf(file, "prev_mean") : at::zeros({B, G}, x.options().requires_grad(false));
  const auto var = carried ? leaf(file, "prev_var") : at::ones({B, G}, x.options().requires_grad(false));
  const auto count = file.has("prev_count")
                         ? read_tensor(file, "prev_count")
                         : at::zeros({B}, mean.options().requires_grad(false).dtype(at::kLong));
  const auto mask = file.has("padding_mask") ? std::optional(read_tensor(file, "padding_mask").to(at::kBool))
                                             : std::nullopt;
  const auto result =
      ops::timestep_norm(x, weight, bias, {count, mean, var}, mask, std::stod(metadata.at("eps")));

  Errors errors;
  errors.compare("outputs", result.y, read_tensor(file, "y"), kNorm);
  errors.compare("state", result.state.mean, read_tensor(file, "mean"), kNorm);
  errors.compare("state", result.state.var, read_tensor(file, "var"), kNorm);
  errors.require_equal("count", result.state.count, read_tensor(file, "count"));
  torch::autograd::backward(
      {result.y, result.state.mean, result.state.var},
      {read_tensor(file, "grad_y"), read_tensor(file, "grad_mean"), read_tensor(file, "grad_var")});
  errors.compare("gradients", x.grad(), read_tensor(file, "d_x"), kNorm);
  errors.compare("gradients", weight.grad(), read_tensor(file, "d_weight"), kNorm);
  errors.compare("gradients", bias.grad(), read_tensor(file, "d_bias"), kNorm);
  if (file.has("d_prev_mean")) {
    errors.compare("gradients", mean.grad(), read_tensor(file, "d_prev_mean"), kNorm);
    errors.compare("gradients", var.grad(), read_tensor(file, "d_prev_var"), kNorm);
  }
  return errors;
}

// The coefficients come from the stored parameters in the model's own way (model/gated_attention.cpp).
Errors check_cema(const SafetensorsFile& file) {
  std::map<std::string, at::Tensor> param;
  for (const char* name : {"alpha", "delta", "theta", "gamma", "omega"}) {
    param[name] = leaf(file, std::string("param.") + name);
  }
  const int64_t D = param["alpha"].size(0), N = param["alpha"].size(1);
  model::MegalodonConfig config;
  config.model_dim = D;
  config.cema_ndim = N;
  model::ParameterMaker make({0}, false);
  model::Cema cema(config, make, "cema");
  cema.alpha = param["alpha"].view({D, N});
  cema.delta = param["delta"].view({D, N});
  cema.theta = param["theta"].view({D});
  cema.gamma = param["gamma"];
  cema.omega = param["omega"].view({D});
  const auto x = leaf(file, "x");
  const auto h0 = file.has("h0") ? std::optional(leaf(file, "h0")) : std::nullopt;
  const auto [p, q, eta] = cema.coefficients();
  const auto initial = h0 ? std::optional(at::view_as_complex(*h0)) : std::nullopt;
  const auto result = ops::cema(x, p, q, eta, cema.omega, initial);

  Errors errors;
  const auto h_last = at::view_as_real(result.h_last);
  errors.compare("outputs", result.y, read_tensor(file, "y"), kCemaOutput);
  errors.compare("state", h_last, read_tensor(file, "h_last"), kCemaOutput);
  torch::autograd::backward({result.y, h_last},
                            {read_tensor(file, "grad_y"), read_tensor(file, "grad_h_last")});
  errors.compare("gradients", x.grad(), read_tensor(file, "d_x"), kCemaGradient);
  if (h0) errors.compare("gradients", h0->grad(), read_tensor(file, "d_h0"), kCemaGradient);
  for (const char* name : {"alpha", "gamma", "omega"}) {
    errors.compare("gradients", param[name].grad(), read_tensor(file, std::string("d_") + name),
                   kCemaGradient);
  }
  for (const char* name : {"theta", "delta"}) {
    errors.compare("d_theta, d_delta", param[name].grad(), read_tensor(file, std::string("d_") + name),
                   kCemaAngle);
  }
  return errors;
}

Errors check(const SafetensorsFile& file) {
  if (file.has("tokens")) return check_model(file);
  if (file.has("h_last")) return check_cema(file);
  return check_timestep_norm(file);
}

TEST(Golden, AllMegalodonFiles) {
  const char* chosen = std::getenv("MEGALODON_GOLDEN_DIR");
  const fs::path folder = fs::path(chosen != nullptr ? chosen : MEGALODON_GOLDEN_DEFAULT) / "megalodon";
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  ASSERT_FALSE(paths.empty()) << "no golden files in " << folder;
  for (const auto& path : paths) {
    const auto errors = check(SafetensorsFile(path));
    std::printf("%-44s%s\n", path.filename().c_str(), errors.line().c_str());
    EXPECT_TRUE(errors.passed()) << path << errors.line();
  }
}

}  // namespace
}  // namespace megalodon::golden
