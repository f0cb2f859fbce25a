#include "ops/packed_attention/packed_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/attention/attention.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

Sequences sequences(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> borders{0};
  std::partial_sum(lengths.begin(), lengths.end(), std::back_inserter(borders));
  return {at::tensor(borders, at::kInt).to(testing::device()),
          *std::max_element(lengths.begin(), lengths.end())};
}

struct Heads {
  int64_t H, Hkv, dk, dv;
};

Tensors inputs(const std::vector<int64_t>& lengths, const Heads& h, at::ScalarType type) {
  const int64_t T = std::reduce(lengths.begin(), lengths.end());
  return {testing::random({T, h.H, h.dk}, type), testing::random({T, h.Hkv, h.dk}, type),
          testing::random({T, h.Hkv, h.dv}, type)};
}

auto on(const Sequences& s, decltype(packed_attention)* f) {
  return [=](const Tensors& in) {
    const auto scale = 1 / std::sqrt(static_cast<double>(in[0].size(2)));
    return Tensors{f(in[0], in[1], in[2], {testing::beside(in[0], s.borders), s.longest}, scale)};
  };
}

void expect_agreement(const std::vector<int64_t>& lengths, const Heads& h) {
  const auto s = sequences(lengths);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(::testing::Message() << ::testing::PrintToString(lengths) << " H " << h.H << "/" << h.Hkv
                                      << " d " << h.dk << "/" << h.dv << " " << type);
    testing::expect_agreement(on(s, packed_attention), on(s, packed_attention_reference),
                              inputs(lengths, h, type));
  }
}

TEST(PackedAttention, AgreesWithReferenceOnManyLengths) {
  expect_agreement({1}, {1, 1, 32, 32});
  expect_agreement({3, 1, 17, 0, 16, 15, 40}, {2, 2, 32, 32});
  expect_agreement({56, 8, 0, 0, 33, 47, 56, 1}, {6, 6, 64, 64});
  expect_agreement({5, 130, 64}, {4, 2, 64, 64});
  expect_agreement({2, 255, 256, 7}, {2, 1, 128, 128});
  expect_agreement({9, 300, 1, 77}, {4, 2, 64, 64});
  expect_agreement({1, 432, 16, 291}, {2, 2, 64, 64});
  expect_agreement({600, 20}, {2, 2, 32, 32});
  expect_agreement({5, 12, 3}, {2, 1, 10, 7});
}

// As one product gives them; where no heads share keys, the gradients come back so on a GPU.
TEST(PackedAttention, TakesColumnsOfOneTensor) {
  for (const auto& h : {Heads{6, 6, 64, 64}, {4, 2, 32, 32}, {2, 2, 16, 16}, {2, 1, 128, 128}}) {
    for (const auto& lengths : {std::vector<int64_t>{56, 8, 0, 33, 1}, {300, 5}}) {
      const auto s = sequences(lengths);
      const auto apart = [&](decltype(packed_attention)* f) {
        return [=](const Tensors& in) {
          const auto heads = in[0].split_with_sizes({h.Hkv, h.Hkv, h.H}, 1);
          return on(s, f)({heads[2], heads[0], heads[1]});
        };
      };
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(::testing::Message()
                     << ::testing::PrintToString(lengths) << " d " << h.dk << " " << type);
        testing::expect_agreement(
            apart(packed_attention), apart(packed_attention_reference),
            {testing::random({std::reduce(lengths.begin(), lengths.end()), h.H + 2 * h.Hkv, h.dk}, type)});
      }
    }
  }
}

TEST(PackedAttention, IsAttentionOfEachSequence) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const std::vector<int64_t> lengths{20, 20, 20};
    const auto x = inputs(lengths, {2, 2, 32, 32}, type);
    const auto rows = [](const at::Tensor& t) { return t.unflatten(0, {3, 20}); };
    const auto start = at::zeros({3}, x[0].options().dtype(at::kLong));
    const auto expected =
        attention(rows(x[0]), rows(x[1]), rows(x[2]), start, {.scale = 1 / std::sqrt(32.0)});
    const auto got = on(sequences(lengths), packed_attention)(x)[0];
    EXPECT_LE(testing::relative_error(got, expected.flatten(0, 1)), type == at::kFloat ? 2e-6 : 1.5e-2);
  }
}

TEST(PackedAttention, GradientsMeetFiniteDifferences) {
  testing::expect_gradients(on(sequences({3, 0, 1, 4}), packed_attention),
                            inputs({3, 0, 1, 4}, {2, 1, 4, 3}, at::kDouble));
}

TEST(PackedAttention, NamesWhatDoesNotFit) {
  const auto x = at::zeros({5, 2, 8});
  const auto borders = [](const std::vector<int64_t>& b) { return at::tensor(b, at::kInt); };
  testing::expect_error([&] { packed_attention(x, x, x, {borders({0, 4}), 5}, 1); },
                        "[packed_attention] borders: expected them to go from 0 to 5, got 0 to 4");
  testing::expect_error([&] { packed_attention(x, x, x, {borders({0, 4, 3, 5}), 5}, 1); },
                        "[packed_attention] borders: sequence 1: expected 0 to 5 rows, got -1");
  testing::expect_error([&] { packed_attention(x, x, x, {borders({0, 5}), 4}, 1); },
                        "[packed_attention] borders: sequence 0: expected 0 to 4 rows, got 5");
  testing::expect_error([&] { packed_attention(x, x, x, {at::zeros({2}), 5}, 1); },
                        "[packed_attention] borders: expected Int, got Float");
  testing::expect_error([&] { packed_attention(x, at::zeros({5, 3, 8}), x, {borders({0, 5}), 5}, 1); },
                        "[packed_attention] k: expected a number of heads that divides those of q");
  testing::expect_error([&] { packed_attention(x, x, at::zeros({4, 2, 8}), {borders({0, 5}), 5}, 1); },
                        "[packed_attention] v: expected shape [5, 2, any], got [4, 2, 8]");
}

}  // namespace
}  // namespace megalodon::ops
