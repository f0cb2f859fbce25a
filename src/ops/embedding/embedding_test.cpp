#include "ops/embedding/embedding.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

// The first token is the most frequent.
at::Tensor tokens_of(at::IntArrayRef shape, int64_t V) {
  const auto uniform = at::arange(c10::multiply_integers(shape), at::kLong).mul(7919).remainder(V);
  return uniform.masked_fill(at::arange(uniform.size(0)).remainder(3).eq(0), 0).view(shape);
}

TEST(Embedding, AgreesWithReference) {
  for (const auto& [V, D] : {std::pair<int64_t, int64_t>{1, 1}, {102, 384}, {7, 33}, {400, 260}, {401, 16}}) {
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{1}, {3, 5}, {40, 129}}) {
      SCOPED_TRACE(at::str(V, " x ", D, " ", at::IntArrayRef(shape)));
      const auto tokens = tokens_of(shape, V);
      testing::expect_agreement(
          [&](const Tensors& in) { return Tensors{ops::embedding(in[0], testing::beside(in[0], tokens))}; },
          [&](const Tensors& in) { return Tensors{embedding_reference(in[0], tokens)}; },
          {testing::random({V, D})});
    }
  }
}

TEST(Embedding, GradientsHaveTheSameBitsEveryTime) {
  const auto tokens = tokens_of({64, 50}, 30).to(testing::device()), upstream = testing::random({64, 50, 40});
  const auto gradient = [&] {
    const auto table = at::ones({30, 40}, testing::device()).set_requires_grad(true);
    ops::embedding(table, tokens).backward(upstream);
    return table.grad();
  };
  EXPECT_TRUE(at::equal(gradient(), gradient()));
}

TEST(Embedding, ChoosesRows) {
  for (const auto& [V, D] : {std::pair<int64_t, int64_t>{102, 384}, {7, 1152}, {3, 8}, {5, 33}, {9, 20}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      for (const std::vector<int64_t>& shape : {std::vector<int64_t>{0}, {1}, {33}, {13, 5}, {300, 7}}) {
        SCOPED_TRACE(at::str(V, " x ", D, " ", type, " ", at::IntArrayRef(shape)));
        const auto table = testing::random({V, D}, type), tokens = tokens_of(shape, V).to(table.device());
        EXPECT_TRUE(at::equal(chosen_rows(table, tokens), at::embedding(table, tokens)));
      }
    }
  }
}

TEST(Embedding, SumsRowsByToken) {
  for (const auto& [V, N, D] :
       {std::tuple<int64_t, int64_t, int64_t>{1, 1, 8}, {7, 50, 24}, {102, 5000, 72}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(V, " ", N, " x ", D, " ", type));
      const auto x = testing::random({N, D}, type), tokens = tokens_of({N}, V).to(x.device());
      const auto want =
          at::zeros({V, D}, x.options().dtype(at::kDouble)).index_add(0, tokens, x.to(at::kDouble));
      const auto got = token_sums(x, tokens, V);
      EXPECT_EQ(got.scalar_type(), at::kFloat);
      // A CPU's product of bfloat16 is rounded to that.
      EXPECT_LE(testing::relative_error(got, want), type == at::kFloat || x.is_cuda() ? 1e-5 : 4e-3);
    }
  }
}

TEST(Embedding, NamesWhatDoesNotFit) {
  testing::expect_error([] { ops::embedding(at::zeros({3}), at::zeros({2}, at::kLong)); },
                        "[embedding] table:");
  testing::expect_error([] { ops::embedding(at::zeros({3, 2}), at::zeros({2}, at::kInt)); },
                        "[embedding] tokens:");
}

}  // namespace
}  // namespace megalodon::ops
