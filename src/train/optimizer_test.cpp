#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "ops/testing.h"

namespace megalodon::train {
namespace {

std::vector<model::Parameter> parameters() {
  return {{"matrix.weight", ops::testing::random({3, 4}).set_requires_grad(true), true},
          {"norm.weight", ops::testing::random({5}).set_requires_grad(true), false}};
}

void step(AdamW& optimizer, double rate, bool skipped = false) {
  const auto on = at::device(ops::testing::device());
  const auto number = ops::testing::device().is_cuda() ? at::kFloat : at::kDouble;
  optimizer.step(at::scalar_tensor(rate, on.dtype(number)), optimizer.gradient_norms(),
                 at::scalar_tensor(skipped, on.dtype(at::kBool)));
}

void set_gradients(const std::vector<model::Parameter>& all, double scale) {
  for (const auto& p : all) {
    auto value = p.value;
    value.mutable_grad() = ops::testing::random(value.sizes()) * scale;
  }
}

// The update of Loshchilov and Hutter (2019), element by element in float64.
TEST(AdamW, FollowsItsDefinition) {
  const AdamWOptions o{.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 0.5};
  const auto all = parameters();
  AdamW optimizer(all, o);
  std::vector<at::Tensor> value, m, v;
  for (const auto& p : all) {
    value.push_back(p.value.detach().to(at::kDouble));
    m.push_back(at::zeros_like(value.back()));
    v.push_back(at::zeros_like(value.back()));
  }
  for (int t = 1; t <= 4; ++t) {
    set_gradients(all, t == 2 ? 0.01 : 1.0);  // once below the bound of the clip
    const double norm = optimizer.gradient_norms()[0].item<double>();
    double squares = 0;
    for (std::size_t i = 0; i < all.size(); ++i)
      squares += all[i].value.grad().to(at::kDouble).square().sum().item<double>();
    EXPECT_NEAR(norm, std::sqrt(squares), 1e-6);
    const double rate = 0.01 * t;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto g = all[i].value.grad().to(at::kDouble) * std::min(1.0, o.clip / norm);
      m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
      v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
      value[i] = value[i] * (1 - rate * (all[i].is_matrix ? o.weight_decay : 0));
      value[i] = value[i] - rate * (m[i] / (1 - std::pow(o.beta1, t))) /
                                ((v[i] / (1 - std::pow(o.beta2, t))).sqrt() + o.eps);
    }
    step(optimizer, rate);
    for (std::size_t i = 0; i < all.size(); ++i) {
      EXPECT_LE(ops::testing::relative_error(all[i].value.detach(), value[i]), 1e-6)
          << all[i].name << " step " << t;
      EXPECT_FALSE(all[i].value.grad().defined());
    }
  }
}

TEST(AdamW, ClipsStackedModelsOneByOne) {
  constexpr int64_t K = 3;
  const AdamWOptions o{.beta2 = 0.98, .eps = 1e-12, .weight_decay = 0.01, .clip = 0.5};
  const auto make = [](at::IntArrayRef matrix, at::IntArrayRef norm) -> std::vector<model::Parameter> {
    return {{"matrix.weight", at::ones(matrix, ops::testing::device()).set_requires_grad(true), true},
            {"norm.weight", at::ones(norm, ops::testing::device()).set_requires_grad(true), false}};
  };
  const auto stacked = make({K, 3, 4}, {K, 5});
  AdamW together(stacked, o, K);
  std::vector<std::vector<model::Parameter>> alone;
  std::vector<std::unique_ptr<AdamW>> optimizers;
  for (int64_t k = 0; k < K; ++k) {
    alone.push_back(make({3, 4}, {5}));
    optimizers.push_back(std::make_unique<AdamW>(alone.back(), o));
  }
  for (int t = 0; t < 3; ++t) {
    set_gradients(stacked, 1);
    for (std::size_t i = 0; i < stacked.size(); ++i)
      stacked[i].value.grad()[1].mul_(0.01);  // below the bound
    for (std::size_t k = 0; k < K; ++k) {
      for (std::size_t i = 0; i < stacked.size(); ++i) {
        alone[k][i].value.mutable_grad() = stacked[i].value.grad()[static_cast<int64_t>(k)].clone();
      }
    }
    step(together, 0.1);
    for (std::size_t k = 0; k < K; ++k) {
      step(*optimizers[k], 0.1);
      for (std::size_t i = 0; i < stacked.size(); ++i) {
        EXPECT_TRUE(at::allclose(stacked[i].value.detach()[static_cast<int64_t>(k)],
                                 alone[k][i].value.detach(), 1e-6, 1e-7));
      }
    }
  }
}

TEST(AdamW, ChangesNothingWhereSkipped) {
  const auto all = parameters();
  const auto before = all[0].value.detach().clone();
  AdamW optimizer(all, {}), fresh(all, {});
  set_gradients(all, std::numeric_limits<double>::quiet_NaN());
  step(optimizer, 0.1, true);
  EXPECT_TRUE(at::equal(all[0].value.detach(), before));
  EXPECT_FALSE(all[0].value.grad().defined());
  for (std::size_t i = 0; i < optimizer.state().size(); ++i)
    EXPECT_TRUE(at::equal(optimizer.state()[i].second, fresh.state()[i].second));
}

TEST(AdamW, GoesOnFromItsState) {
  const auto path = std::filesystem::temp_directory_path() / "megalodon_optimizer_test.safetensors";
  const auto all = parameters();
  AdamW optimizer(all, {});
  set_gradients(all, 1);
  step(optimizer, 0.1);
  model::save_tensors(path, optimizer.state());
  std::vector<model::Parameter> copy;
  for (const auto& p : all)
    copy.push_back({p.name, p.value.detach().clone().set_requires_grad(true), p.is_matrix});
  AdamW again(copy, {});
  again.load(SafetensorsFile(path));
  set_gradients(all, 1);
  for (std::size_t i = 0; i < all.size(); ++i) {
    auto value = copy[i].value;
    value.mutable_grad() = all[i].value.grad().clone();
  }
  step(optimizer, 0.1);
  step(again, 0.1);
  for (std::size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(at::equal(all[i].value, copy[i].value));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace megalodon::train
