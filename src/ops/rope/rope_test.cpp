#include "ops/rope/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

at::Tensor starts(const std::vector<int64_t>& start) {
  return at::tensor(start, at::kLong).to(testing::device());
}

TEST(Rope, AgreesWithReference) {
  struct Case {
    int64_t B, L, H, d, chunk;
    std::vector<int64_t> start;
  };
  const std::vector<Case> cases{{1, 1, 1, 2, 0, {0}},
                                {2, 5, 3, 6, 4, {0, 3}},
                                {3, 70, 2, 64, 16, {0, 5, 15}},
                                {7, 1, 3, 34, 512, {0, 1, 2, 511, 512, 600, 9}},
                                {2, 300, 1, 16, 0, {0, 1000}},
                                {1, 130, 2, 256, 128, {1000000000000}},
                                {2, 9, 1, 8, 7, {1LL << 62, (1LL << 62) - 3}}};
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& c : cases) {
      for (const bool inverse : {false, true}) {
        const auto x = testing::random({c.B, c.L, c.H, c.d}, type);
        testing::expect_agreement(
            [&](const Tensors& in) { return Tensors{rope(in[0], in[1], c.chunk, 1e4, inverse)}; },
            [&](const Tensors& in) { return Tensors{rope_reference(in[0], in[1], c.chunk, 1e4, inverse)}; },
            {x, starts(c.start)});
      }
    }
  }
}

TEST(Rope, RotatesAdjacentPairsByTheirAngle) {
  const auto x = at::tensor({1.0, 0.0, 0.0, 1.0}, at::kDouble).view({1, 1, 1, 4}).to(testing::device());
  const auto y = rope(x, starts({1000003}), 1000, 100.0).view({4});  // position 3; frequencies 1 and 1/10
  const auto want = at::tensor({std::cos(3.0), std::sin(3.0), -std::sin(0.3), std::cos(0.3)}, at::kDouble);
  EXPECT_LE(testing::relative_error(y, want), 1e-14);
}

TEST(Rope, InverseRotatesBack) {
  const auto x = testing::random({2, 33, 2, 10});
  const auto start = starts({5, 1LL << 62});
  const auto y = rope(rope(x, start, 11, 1e4), start, 11, 1e4, /*inverse=*/true);
  EXPECT_LE(testing::relative_error(y, x), 1e-6);
}

TEST(Rope, GradientsMeetFiniteDifferences) {
  testing::expect_gradients([](const Tensors& in) { return Tensors{rope(in[0], in[1], 3, 50.0)}; },
                            {testing::random({2, 4, 2, 6}, at::kDouble), starts({0, 2})});
}

TEST(Rope, NamesWhatDoesNotFit) {
  const auto x = at::zeros({2, 3, 1, 4});
  testing::expect_error([&] { rope(at::zeros({2, 3, 1, 5}), starts({0, 0}), 0, 1e4); },
                        "[rope] x: expected an even number of features in a head, got 5");
  testing::expect_error([&] { rope(x, starts({0}), 0, 1e4); }, "[rope] start: expected shape [2], got [1]");
  testing::expect_error([&] { rope(x, starts({0, 0}), -1, 1e4); },
                        "[rope] chunk: expected at least 0, got -1");
  testing::expect_error([&] { rope(x, starts({0, 0}), 0, 0); }, "[rope] base: expected a positive number");
  testing::expect_error([&] { rope(x.to(at::kHalf), starts({0, 0}), 0, 1e4); },
                        "[rope] x: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
