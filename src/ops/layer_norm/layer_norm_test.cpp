#include "ops/layer_norm/layer_norm.h"

#include <ATen/Parallel.h>
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

Tensors affine_reference(const Tensors& in) {
  return {layer_norm_reference(in[0], in[1], in[2])};
}
Tensors plain_reference(const Tensors& in) {
  return {layer_norm_reference(in[0], std::nullopt, std::nullopt)};
}

TEST(LayerNorm, AgreesWithReference) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{1},
                                            {5, 1},
                                            {7, 3},
                                            {4, 16},
                                            {2, 3, 67},
                                            {1, 2, 3, 192},
                                            {129, 48},
                                            {5000, 33},
                                            {13, 2048},
                                            {6, 1001},
                                            {5, 7000}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(at::IntArrayRef(shape), " ", type));
      const auto x = testing::random(shape, type);
      testing::expect_agreement(affine, affine_reference,
                                {x, testing::random({shape.back()}), testing::random({shape.back()})});
      testing::expect_agreement(plain, plain_reference, {x});
    }
  }
}

TEST(LayerNorm, AgreesAtEveryScale) {
  for (const double scale : {1e-4, 1e-2, 1e4}) {
    SCOPED_TRACE(scale);
    testing::expect_agreement(
        affine, affine_reference,
        {testing::random({65, 40}) * scale, testing::random({40}), testing::random({40})});
  }
  testing::expect_agreement(affine, affine_reference,
                            {testing::random({65, 40}) + 100, testing::random({40}), testing::random({40})});
  testing::expect_agreement(
      affine, affine_reference,
      {at::full({3, 40}, 0.1f, testing::device()), testing::random({40}), testing::random({40})});
}

TEST(LayerNorm, WeightGradientsDoNotDependOnTheNumberOfThreads) {
  const auto x = testing::random({1000, 24}), upstream = testing::random({1000, 24});
  const auto gradient = [&](int threads) {
    at::set_num_threads(threads);
    auto w = at::ones({24}, testing::device()).set_requires_grad(true);
    layer_norm(x, w, at::zeros({24}, testing::device())).backward(upstream);
    return w.grad();
  };
  const int threads = at::get_num_threads();
  const auto alone = gradient(1);
  EXPECT_TRUE(gradient(2).equal(alone));
  at::set_num_threads(threads);
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
