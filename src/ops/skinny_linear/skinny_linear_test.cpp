#include "ops/skinny_linear/skinny_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

// A plain layer; norm, bias and sum; an activation; two products in one.
std::vector<SkinnyLayer> layers_of(const Tensors& t) {
  return {{.x = t[0], .weight = t[1]},
          {.x = t[0], .norm = InputNorm::rms, .norm_weight = t[2], .weight = t[1], .bias = t[3], .add = t[4]},
          {.x = t[0],
           .norm = InputNorm::layer,
           .norm_weight = t[2],
           .norm_bias = t[5],
           .weight = t[6],
           .silu = true},
          {.x = t[7], .weight = t[6], .silu = true, .up = t[8]},
          {.x = t[7], .norm = InputNorm::rms, .weight = t[6]}};
}

Tensors inputs(int64_t rows, int64_t in, int64_t out, int64_t more, at::ScalarType type) {
  const auto vector = [](int64_t size) { return testing::random({size}); };
  const auto weight = [&](int64_t size) {
    return testing::random({size, in}, type) / std::sqrt(static_cast<double>(in));
  };
  const auto x = [&](int64_t features) { return testing::random({rows, 1, features}, type); };
  return {x(in), weight(out), vector(in), vector(out), x(out), vector(in), weight(more), x(in), weight(more)};
}

TEST(SkinnyLinear, AgreesWithReferenceWithoutGradients) {
  const at::NoGradGuard no_grad;
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t rows : {1, 3, 4, 5, 8, 17, 32, 33}) {
      for (const auto& [in, out, more] :
           {std::tuple{32, 1, 7}, {96, 40, 17}, {160, 392, 68}, {2048, 70, 16}, {4864, 33, 9}, {50, 6, 3}}) {
        const auto t = inputs(rows, in, out, more, type);
        Tensors in64;
        for (const auto& x : t) in64.push_back(x.cpu().to(at::kDouble));
        const auto want = skinny_linear_reference(layers_of(in64));
        const testing::PoisonedMemory poisoned;
        const auto got = skinny_linear(layers_of(t));
        for (std::size_t i = 0; i < want.size(); ++i) {
          ASSERT_EQ(got[i].sizes(), want[i].sizes());
          EXPECT_LE(testing::relative_error(got[i], want[i]), type == at::kFloat ? 1e-5 : 2e-2)
              << "layer " << i << " of " << rows << " x " << in << " -> " << want[i].size(-1) << " " << type;
        }
      }
    }
  }
}

// Their products are one on a GPU: of an activation and what multiplies it, a biased one and an activation
// with something added. A plain layer and one of another input end the row.
TEST(SkinnyLinear, TakesWeightsThatLieTogether) {
  const at::NoGradGuard no_grad;
  for (const int64_t rows : {2, 5, 32}) {
    for (const int64_t out : {24, 7}) {
      const auto random = [](at::IntArrayRef shape) { return testing::random(shape, at::kBFloat16); };
      const auto x = random({rows, 64}), other = random({rows, 64}), add = random({rows, out});
      const auto whole = random({6 * out, 64}) / 8;
      const auto bias = testing::random({out}), norm = testing::random({64});
      const auto layers = [&](auto in) {
        const auto all = in(whole);
        const auto weight = [&](int64_t i) { return all.narrow(0, i * out, out); };
        const SkinnyLayer of_x{.x = in(x), .norm = InputNorm::rms, .norm_weight = in(norm)};
        auto gated = of_x, biased = of_x, activated = of_x, plain = of_x, last = of_x;
        gated.weight = weight(0), gated.silu = true, gated.up = weight(1);
        biased.weight = weight(2), biased.bias = in(bias);
        activated.weight = weight(3), activated.bias = in(bias), activated.silu = true;
        activated.add = in(add);
        plain.weight = weight(4), plain.add = in(add);
        last.x = in(other), last.weight = weight(5), last.bias = in(bias);
        return std::vector{gated, biased, activated, plain, last};
      };
      const auto want =
          skinny_linear_reference(layers([](const at::Tensor& t) { return t.cpu().to(at::kDouble); }));
      const testing::PoisonedMemory poisoned;
      const auto got = skinny_linear(layers([](const at::Tensor& t) { return t; }));
      for (std::size_t i = 0; i < want.size(); ++i)
        EXPECT_LE(testing::relative_error(got[i], want[i]), 2e-2)
            << "layer " << i << " of " << rows << " -> " << out;
    }
  }
}

// So many outputs that nothing is gained where blocks share the features.
TEST(SkinnyLinear, TakesManyOutputs) {
  const at::NoGradGuard no_grad;
  for (const int64_t out : {11304, 11303}) {
    const auto x = testing::random({32, 448}, at::kBFloat16);
    const auto weight = testing::random({out, 448}, at::kBFloat16) / 20;
    const auto want = at::linear(x.cpu().to(at::kDouble), weight.cpu().to(at::kDouble));
    const testing::PoisonedMemory poisoned;
    EXPECT_LE(testing::relative_error(skinny_linear({{.x = x, .weight = weight}})[0], want), 1e-2) << out;
  }
}

// Kernels that follow each other overlap on a GPU; what one reads of the other must be there.
TEST(SkinnyLinear, ReadsWhatTheCallBeforeWrote) {
  const at::NoGradGuard no_grad;
  constexpr int64_t kWidth = 1024, kHidden = 2432, kLayers = 6;
  for (const int64_t rows : {2, 7, 32}) {
    const auto random = [](at::IntArrayRef shape) { return testing::random(shape, at::kBFloat16); };
    const auto x = random({rows, kWidth});
    const auto first = random({kLayers, kHidden, kWidth}) / 32,
               second = random({kLayers, kWidth, kHidden}) / 49;
    const auto norm = testing::random({kWidth}), bias = testing::random({kHidden});
    const auto chain = [&](auto run, auto in) {
      auto y = in(x);
      for (int64_t i = 0; i < kLayers; ++i) {
        const auto hidden = run({{.x = y,
                                  .norm = InputNorm::rms,
                                  .norm_weight = in(norm),
                                  .weight = in(first)[i],
                                  .bias = in(bias),
                                  .silu = true}},
                                1e-5)[0];
        y = run({{.x = hidden, .weight = in(second)[i], .add = y}}, 1e-5)[0];
      }
      return y;
    };
    using Layers = std::vector<SkinnyLayer>;
    const auto want =
        chain([](const Layers& layers, double eps) { return skinny_linear_reference(layers, eps); },
              [](const at::Tensor& t) { return t.cpu().to(at::kDouble); });
    const auto run = [&] {
      return chain([](const Layers& layers, double eps) { return skinny_linear(layers, eps); },
                   [](const at::Tensor& t) { return t; });
    };
    const auto got = run();
    EXPECT_LE(testing::relative_error(got, want), 3e-2) << rows;
    for (int i = 0; i < 8; ++i) EXPECT_TRUE(at::equal(run(), got)) << rows;
  }
}

TEST(SkinnyLinear, IsDifferentiable) {
  const auto t = inputs(4, 32, 8, 5, at::kFloat);
  testing::expect_agreement([](const auto& x) { return skinny_linear(layers_of(x)); },
                            [](const auto& x) { return skinny_linear_reference(layers_of(x)); }, t, 1e-5);
}

TEST(SkinnyLinear, NamesWhatDoesNotFit) {
  const auto x = at::zeros({2, 32});
  testing::expect_error([&] { skinny_linear({{.x = x, .weight = at::zeros({3, 31})}}); },
                        "[skinny_linear] weight: expected shape [any, 32], got [3, 31]");
  testing::expect_error(
      [&] { skinny_linear({{.x = x, .weight = at::zeros({3, 32}), .up = at::zeros({3, 32})}}); },
      "[skinny_linear] up: expected none without silu, got one");
}

}  // namespace
}  // namespace megalodon::ops
