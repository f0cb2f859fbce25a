#include "model/recomputed.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "model/layers.h"
#include "ops/swiglu/swiglu.h"
#include "ops/testing.h"

namespace megalodon::model {
namespace {
using ops::testing::random;

struct Inputs {
  at::Tensor x = random({5, 8}).set_requires_grad(true), weight = random({6, 8}).set_requires_grad(true);

  // With a chain of two functions between the inputs and the product.
  at::Tensor result(bool recomputed, DropoutKeys keys) const {
    const Drop drop(0.3, &keys);
    const auto activation = [x = x] { return ops::swiglu(x * 2); };
    if (!recomputed) return x.sum() + project(drop(activation()), weight).square().sum();
    Recomputed anew;
    const auto first = anew.add(activation);
    const auto second = anew.add([=] { return drop(first); });
    return anew.until_gradient(x.sum() + project(second, weight).square().sum());
  }
};

TEST(Recomputed, GradientsAreThoseOfWhatIsKept) {
  const Inputs in;
  const auto gradients = [&](bool recomputed) {
    return torch::autograd::grad({in.result(recomputed, {1, 2})}, {in.x, in.weight});
  };
  const auto kept = gradients(false), anew = gradients(true);
  for (std::size_t i = 0; i < kept.size(); ++i) EXPECT_TRUE(at::equal(kept[i], anew[i])) << i;
}

TEST(Recomputed, GivesMemoryBackUntilTheGradientComes) {
  const auto x = random({1000}).set_requires_grad(true);
  Recomputed anew;
  const auto y = anew.add([=] { return x * 2; });
  const auto z = anew.until_gradient(y.square().sum());
  EXPECT_EQ(y.storage().nbytes(), 0u);
  z.backward();
  EXPECT_TRUE(at::equal(y, x * 2));
  EXPECT_TRUE(at::equal(x.grad(), x * 8));
}

TEST(Recomputed, GivesBackSeveralResultsOfOneCall) {
  const auto x = random({1000}).set_requires_grad(true);
  int calls = 0;
  Recomputed anew;
  const auto y = anew.add([&calls, x] {
    ++calls;
    return std::vector{x * 2, x.square()};
  });
  const auto z = anew.until_gradient((y[0] * y[1]).sum());
  for (const auto& result : y) EXPECT_EQ(result.storage().nbytes(), 0u);
  z.backward();
  EXPECT_EQ(calls, 2);
  EXPECT_LE(ops::testing::relative_error(x.grad(), 6 * x.detach().square()), 1e-6);
}

TEST(Recomputed, ServesABackwardPassThatRunsTwice) {
  const Inputs in;
  const auto result = in.result(true, {1, 2});
  const auto first = torch::autograd::grad({result}, {in.x}, {}, /*retain_graph=*/true);
  EXPECT_TRUE(at::equal(torch::autograd::grad({result}, {in.x})[0], first[0]));
}

TEST(Recomputed, DoesNothingWithoutGradients) {
  const auto x = random({4});
  int calls = 0;
  Recomputed anew;
  const auto y = anew.add([&] { return ++calls, x * 2; });
  const auto z = anew.until_gradient(y + 1);
  EXPECT_TRUE(at::equal(y, x * 2));
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace megalodon::model
