#include "ops/dropout/dropout.h"

#include <gtest/gtest.h>

#include "base/random.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {

constexpr int64_t kKey = -0x123456789ABCDEF;

TEST(Dropout, KeepsAFunctionOfKeyAndPlace) {
  const auto y = dropout(at::ones({13}, testing::device()), 0.25, kKey);
  for (int64_t i = 0; i < 13; ++i) {
    const auto word =
        philox(static_cast<uint64_t>(kKey), static_cast<uint64_t>(i / 4), 0)[static_cast<size_t>(i % 4)];
    EXPECT_FLOAT_EQ(y[i].item<float>(), word >= 0x40000000u ? 1 / 0.75f : 0.0f) << i;
  }
  EXPECT_FALSE(dropout(at::ones({64}), 0.25, kKey + 1).equal(dropout(at::ones({64}), 0.25, kKey)));
}

TEST(Dropout, AgreesWithReference) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{1}, {3, 5, 7}, {2, 64}, {4, 1000, 33}}) {
      testing::expect_agreement(
          [](const auto& in) { return testing::Tensors{dropout(in[0], 0.3, kKey)}; },
          [](const auto& in) { return testing::Tensors{dropout_reference(in[0], 0.3, kKey)}; },
          {testing::random(shape, type)});
    }
  }
  EXPECT_TRUE(dropout(at::ones({5, 7}, testing::device()).t(), 0.3, kKey)
                  .cpu()
                  .equal(dropout_reference(at::ones({7, 5}), 0.3, kKey)));
}

TEST(Dropout, RateZeroIsTheInput) {
  const auto x = testing::random({5});
  EXPECT_TRUE(dropout(x, 0, kKey).is_same(x));
}

TEST(Dropout, KeepsTheShareItShould) {
  for (const double p : {0.1, 0.5, 0.9}) {
    const double dropped =
        dropout(at::ones({200000}, testing::device()), p, kKey).eq(0).to(at::kDouble).mean().item<double>();
    EXPECT_NEAR(dropped, p, 5 * std::sqrt(p * (1 - p) / 200000)) << p;
  }
}

TEST(Dropout, GradientsMeetFiniteDifferences) {
  testing::expect_gradients([](const auto& in) { return testing::Tensors{dropout(in[0], 0.3, kKey)}; },
                            {testing::random({3, 7}, at::kDouble)});
}

TEST(Dropout, NamesWhatDoesNotFit) {
  testing::expect_error([] { dropout(at::zeros({3}), 1.0, kKey); },
                        "[dropout] p: expected 0 <= p < 1, got 1");
  testing::expect_error([] { dropout(at::zeros({3}), -0.1, kKey); },
                        "[dropout] p: expected 0 <= p < 1, got -0.1");
  testing::expect_error([] { dropout(at::zeros({3}, at::kHalf), 0.1, kKey); },
                        "[dropout] x: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
