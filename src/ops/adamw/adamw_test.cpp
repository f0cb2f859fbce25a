#include "ops/adamw/adamw.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

constexpr AdamWConstants kConstants{.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};

// Tensors of K models of the shapes that kernels meet: whole packs and not, more than one launch takes.
AdamWTensors tensors(int64_t K) {
  AdamWTensors all;
  for (int64_t i = 0; i < 70; ++i) {
    const int64_t n = i == 3 ? 9001 : i == 5 ? 0 : i % 7 * 4 + (i % 2);
    all.parameters.push_back(testing::random({K, n}));
    all.first_moments.push_back(at::zeros_like(all.parameters.back()));
    all.second_moments.push_back(at::zeros_like(all.parameters.back()));
    const bool rounded = i % 3 != 1;
    all.rounded.push_back(at::full({rounded ? K : 0, rounded ? n : 0}, std::nan(""),
                                   at::device(testing::device()).dtype(at::kBFloat16)));
  }
  all.steps = at::zeros({}, testing::device());
  return all;
}

void step(const AdamWTensors& all, const Tensors& gradients, const at::Tensor& divisors, double rate,
          double skip) {
  const auto device = testing::device();
  Tensors own;
  for (const auto& gradient : gradients) own.push_back(gradient.clone());
  adamw(all, own, divisors,
        at::full({}, rate, at::dtype(device.is_cpu() ? at::kDouble : at::kFloat).device(device)),
        at::full({}, skip, at::device(device)), kConstants);
}

// The update of Loshchilov and Hutter (2019), element by element in float64.
TEST(AdamWStep, FollowsItsDefinition) {
  for (const int64_t K : {1, 3}) {
    const auto all = tensors(K);
    const auto divisors = at::arange(1, K + 1, at::device(testing::device()).dtype(at::kFloat));
    Tensors value, m, v;
    for (const auto& p : all.parameters) {
      value.push_back(p.cpu().to(at::kDouble));
      m.push_back(at::zeros_like(value.back()));
      v.push_back(at::zeros_like(value.back()));
    }
    for (int t = 1; t <= 4; ++t) {
      Tensors gradients;
      for (const auto& p : all.parameters) gradients.push_back(testing::random(p.sizes()));
      const double rate = 0.01 * t;
      step(all, gradients, divisors, rate, 0);
      for (std::size_t i = 0; i < value.size(); ++i) {
        const auto g = gradients[i].cpu().to(at::kDouble) / divisors.cpu().to(at::kDouble).unsqueeze(1);
        m[i] = kConstants.beta1 * m[i] + (1 - kConstants.beta1) * g;
        v[i] = kConstants.beta2 * v[i] + (1 - kConstants.beta2) * g * g;
        value[i] = value[i] * (1 - rate * kConstants.weight_decay);
        value[i] = value[i] - rate * (m[i] / (1 - std::pow(kConstants.beta1, t))) /
                                  ((v[i] / (1 - std::pow(kConstants.beta2, t))).sqrt() + kConstants.eps);
        EXPECT_LE(testing::relative_error(all.parameters[i], value[i]), 1e-6) << i << " step " << t;
        EXPECT_LE(testing::relative_error(all.first_moments[i], m[i]), 1e-6) << i << " step " << t;
        EXPECT_LE(testing::relative_error(all.second_moments[i], v[i]), 1e-6) << i << " step " << t;
        if (all.rounded[i].numel() > 0)
          EXPECT_TRUE(at::equal(all.rounded[i], all.parameters[i].to(at::kBFloat16))) << i << " step " << t;
      }
    }
    EXPECT_EQ(all.steps.item<float>(), 4);
  }
}

TEST(AdamWStep, ChangesNothingWhereSkipped) {
  const auto all = tensors(1);
  Tensors before, gradients;
  for (const auto& p : all.parameters) {
    before.push_back(p.clone());
    gradients.push_back(at::full_like(p, std::nan("")));
  }
  step(all, gradients, at::full({1}, std::nan(""), at::device(testing::device()).dtype(at::kFloat)), 0.1, 1);
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_TRUE(at::equal(all.parameters[i], before[i]));
    EXPECT_EQ(all.first_moments[i].abs().sum().item<float>(), 0);
    EXPECT_EQ(all.second_moments[i].abs().sum().item<float>(), 0);
  }
  EXPECT_EQ(all.steps.item<float>(), 0);
}

TEST(AdamWStep, NamesWhatDoesNotFit) {
  const auto all = tensors(1);
  testing::expect_error([&] { step(all, {}, at::ones({1}), 0.1, 0); },
                        "[adamw] gradients: expected 70, got 0");
}

}  // namespace
}  // namespace megalodon::ops
