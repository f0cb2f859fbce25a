#include "ops/query_key/query_key.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

at::Tensor starts(const std::vector<int64_t>& start) {
  return at::tensor(start, at::kLong).to(testing::device());
}

auto with(int64_t chunk, double eps, decltype(query_key)* f) {
  return [=](const Tensors& in) {
    const auto [q, k] = f(in[0], in[1], in[2], in[3], chunk, 1e4, eps);
    return Tensors{q, k};
  };
}

TEST(QueryKey, AgreesWithReference) {
  struct Case {
    int64_t B, L, H, dz, chunk;
    std::vector<int64_t> start;
  };
  const std::vector<Case> cases{
      {1, 1, 1, 2, 0, {0}},           {2, 5, 3, 6, 4, {0, 3}},
      {3, 70, 2, 64, 16, {0, 5, 15}}, {7, 1, 3, 34, 512, {0, 1, 2, 511, 512, 600, 9}},
      {2, 300, 1, 16, 0, {0, 1000}},  {1, 130, 2, 256, 128, {1000000000000}}};
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& c : cases) {
      const auto z = testing::random({c.B, c.L, c.H, c.dz}, type);
      const auto gamma = testing::random({2, c.H * c.dz}), beta = testing::random({2, c.H * c.dz});
      testing::expect_agreement(with(c.chunk, 1e-5, query_key), with(c.chunk, 1e-5, query_key_reference),
                                {z, gamma, beta, starts(c.start)});
    }
  }
}

TEST(QueryKey, TinyInputsMeetEps) {
  const auto z = 1e-4 * testing::random({2, 3, 2, 8});
  testing::expect_agreement(with(0, 1e-5, query_key), with(0, 1e-5, query_key_reference),
                            {z, testing::random({2, 16}), testing::random({2, 16}), starts({0, 0})});
}

TEST(QueryKey, GradientsMeetFiniteDifferences) {
  testing::expect_gradients(with(3, 1e-5, query_key),
                            {testing::random({2, 4, 2, 4}, at::kDouble), testing::random({2, 8}, at::kDouble),
                             testing::random({2, 8}, at::kDouble), starts({0, 2})});
}

TEST(QueryKey, NamesWhatDoesNotFit) {
  const auto z = at::zeros({2, 3, 1, 4}), p = at::zeros({2, 4});
  testing::expect_error([&] { query_key(z, at::zeros({2, 3}), p, starts({0, 0}), 0, 1e4); },
                        "[query_key] gamma: expected shape [2, 4], got [2, 3]");
  testing::expect_error([&] { query_key(z, p, p.to(at::kBFloat16), starts({0, 0}), 0, 1e4); },
                        "[query_key] beta: expected Float, got BFloat16");
  testing::expect_error([&] { query_key(at::zeros({2, 3, 1, 5}), p, p, starts({0, 0}), 0, 1e4); },
                        "[query_key] z: expected an even number of features in a head, got 5");
  testing::expect_error([&] { query_key(z.to(at::kHalf), p, p, starts({0, 0}), 0, 1e4); },
                        "[query_key] z: float16 is not supported");
}

}  // namespace
}  // namespace megalodon::ops
