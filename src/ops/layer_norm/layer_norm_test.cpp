#include "ops/layer_norm/layer_norm.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

Tensors affine(const Tensors& in) {
  return {layer_norm(in[0], in[1], in[2])};
}
Tensors plain(const Tensors& in) {
  return {layer_norm(in[0], std::nullopt, std::nullopt)};
}

TEST(LayerNorm, GradientsMeetFiniteDifferences) {
  const auto x = testing::random({2, 3, 5}, at::kDouble);
  testing::expect_gradients(affine,
                            {x, testing::random({5}, at::kDouble), testing::random({5}, at::kDouble)});
  testing::expect_gradients(plain, {x});
}

TEST(LayerNorm, IsTorchsWithOnePlusWeight) {
  const auto x = testing::random({7, 33}), w = testing::random({33}), b = testing::random({33});
  EXPECT_LE(testing::relative_error(layer_norm(x, w, b), at::layer_norm(x, {33}, 1 + w, b, 1e-5)), 1e-6);
}

TEST(LayerNorm, NamesWhatDoesNotFit) {
  const auto x = at::zeros({2, 3}), three = at::zeros({3});
  testing::expect_error([&] { layer_norm(x, three, at::zeros({2})); },
                        "[layer_norm] bias: expected shape [3], got [2]");
  testing::expect_error([&] { layer_norm(x, three, std::nullopt); },
                        "[layer_norm] bias: expected a tensor, as weight is one, got none");
  testing::expect_error([&] { layer_norm(x, std::nullopt, three); },
                        "[layer_norm] bias: expected none, as weight is none, got a tensor");
  testing::expect_error([&] { layer_norm(x.to(at::kHalf), three, three); },
                        "[layer_norm] x: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
