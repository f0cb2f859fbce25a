#include "ops/add_rms_norm/add_rms_norm.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

constexpr double kEps = 1e-5;

// in: x, factor and, where something is added, that.
Tensors results(const Tensors& in, at::ScalarType type, bool reference) {
  const auto added = in.size() > 2 ? std::optional(in[2]) : std::nullopt;
  const auto [sum, normal] =
      (reference ? add_rms_norm_reference : add_rms_norm)(in[0], added, in[1], kEps, type);
  return {sum, normal};
}

void expect_agreement(const Tensors& in, at::ScalarType type) {
  testing::expect_agreement([&](const Tensors& x) { return results(x, type, false); },
                            [](const Tensors& x) { return results(x, at::kDouble, true); }, in,
                            type == at::kBFloat16 ? 1.5e-2 : 0);
}

TEST(AddRmsNorm, AgreesWithReference) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{16},
                                            {7, 3},
                                            {2, 3, 67},
                                            {1, 2, 3, 192},
                                            {1025, 48},
                                            {5000, 33},
                                            {70, 384},
                                            {9, 517},
                                            {3, 2048},
                                            {5, 2049},
                                            {17, 5000},
                                            {2, 8196}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(at::IntArrayRef(shape), " ", type));
      const auto x = testing::random(shape), factor = testing::random({shape.back()});
      expect_agreement({x, factor, testing::random(shape, type)}, type);
      expect_agreement({x, factor}, type);
    }
  }
}

TEST(AddRmsNorm, GivesEachShareOfTheRowsItsFactor) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    expect_agreement(
        {testing::random({3, 70, 33}), testing::random({3, 33}), testing::random({3, 70, 33}, type)}, type);
    expect_agreement({testing::random({6, 5, 16}), testing::random({3, 16})}, type);
  }
}

TEST(AddRmsNorm, GradientsMeetFiniteDifferences) {
  testing::expect_gradients([](const Tensors& in) { return results(in, at::kDouble, false); },
                            {testing::random({2, 3, 5}, at::kDouble), testing::random({5}, at::kDouble),
                             testing::random({2, 3, 5}, at::kDouble)});
}

// Of one of the two results alone.
TEST(AddRmsNorm, NeedsNotBothGradients) {
  const Tensors in{testing::random({20, 24}), testing::random({24}), testing::random({20, 24})};
  testing::expect_agreement([](const Tensors& x) { return Tensors{results(x, at::kFloat, false)[1]}; },
                            [](const Tensors& x) { return Tensors{results(x, at::kDouble, true)[1]}; }, in);
  for (const auto& x : in) x.set_requires_grad(true);
  const auto upstream = testing::random({20, 24});
  results(in, at::kFloat, false)[0].backward(upstream);
  EXPECT_TRUE(at::equal(in[0].grad(), upstream));
  EXPECT_TRUE(at::equal(in[2].grad(), upstream));
}

TEST(AddRmsNorm, HasTheSameBitsEveryTime) {
  const auto x = testing::random({3000, 72}), upstream = testing::random({3000, 72});
  const auto gradient = [&] {
    const auto factor = at::ones({72}, testing::device()).set_requires_grad(true);
    add_rms_norm(x, {}, factor, kEps, at::kFloat).normal.backward(upstream);
    return factor.grad();
  };
  EXPECT_TRUE(at::equal(gradient(), gradient()));
}

TEST(AddRmsNorm, NamesWhatDoesNotFit) {
  const auto x = at::zeros({4, 3}), factor = at::ones({3});
  testing::expect_error([&] { add_rms_norm(x, {}, at::ones({2}), kEps, at::kFloat); },
                        "[add_rms_norm] factor: expected shape [3], got [2]");
  testing::expect_error([&] { add_rms_norm(x, {}, at::ones({3, 3}), kEps, at::kFloat); },
                        "[add_rms_norm] factor: expected a number that divides the 4 rows of x, got 3");
  testing::expect_error([&] { add_rms_norm(x, x, factor, kEps, at::kBFloat16); },
                        "[add_rms_norm] added: expected BFloat16, got Float");
  testing::expect_error([&] { add_rms_norm(x.to(at::kBFloat16), {}, factor, kEps, at::kBFloat16); },
                        "[add_rms_norm] x: expected Float, got BFloat16");
}

}  // namespace
}  // namespace megalodon::ops
