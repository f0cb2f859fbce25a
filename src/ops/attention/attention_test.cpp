#include "ops/attention/attention.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

at::Tensor starts(const std::vector<int64_t>& start) {
  return at::tensor(start, at::kLong).to(testing::device());
}

struct Shape {
  int64_t B, L, H, Hkv, dk, dv;
};

Tensors inputs(const Shape& s, at::ScalarType type) {
  return {testing::random({s.B, s.L, s.H, s.dk}, type), testing::random({s.B, s.L, s.Hkv, s.dk}, type),
          testing::random({s.B, s.L, s.Hkv, s.dv}, type)};
}

AttentionOptions options(int64_t chunk, int64_t dk, int64_t previous_chunks = 0, double dropout = 0) {
  return {chunk, previous_chunks, 1 / std::sqrt(static_cast<double>(dk)), dropout, 77};
}

auto from_zero(const AttentionOptions& o, decltype(attention)* f) {
  return [=](const Tensors& in) {
    return Tensors{f(in[0], in[1], in[2],
                     at::zeros({in[0].size(0)}, at::TensorOptions(in[0].device()).dtype(at::kLong)), o,
                     std::nullopt)};
  };
}

void expect_agreement(const Shape& s, const AttentionOptions& o) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(::testing::Message() << "B " << s.B << " L " << s.L << " H " << s.H << "/" << s.Hkv << " d "
                                      << s.dk << "/" << s.dv << " chunk " << o.chunk << " " << type);
    testing::expect_agreement(from_zero(o, attention), from_zero(o, attention_reference), inputs(s, type));
  }
}

TEST(Attention, AgreesWithReferenceAtChunkBorders) {
  for (const int64_t c : {1, 4, 20}) {
    for (const int64_t L : {int64_t{1}, c - 1, c, c + 1, 3 * c + 2}) {
      if (L > 0) expect_agreement({2, L, 2, 2, 8, 6}, options(c, 8));
    }
  }
}

TEST(Attention, AgreesWithReferenceOnManyShapes) {
  expect_agreement({1, 1, 1, 1, 1, 1}, options(0, 1));
  expect_agreement({7, 33, 4, 2, 10, 7}, options(0, 10));
  expect_agreement({1, 300, 6, 1, 64, 32}, options(128, 64));
  expect_agreement({2, 150, 3, 3, 64, 128}, options(100, 64));
  expect_agreement({1, 700, 1, 1, 16, 33}, options(0, 16));
  expect_agreement({1, 70, 1, 1, 256, 640}, options(64, 256));
}

TEST(Attention, AgreesWithReferenceOnWideHeads) {
  expect_agreement({2, 256, 1, 1, 256, 512}, options(256, 256));
  expect_agreement({1, 1100, 2, 1, 256, 512}, options(512, 256));
  expect_agreement({1, 768, 1, 1, 256, 768}, options(0, 256));
}

TEST(Attention, AgreesWithReferenceOnNarrowHeadsAndShortChunks) {
  for (const int64_t d : {32, 64, 96, 128}) {
    for (const int64_t L : {2, 15, 16, 17, 56, 128, 255, 256, 257})
      expect_agreement({1, L, 2, 1, d, d}, options(0, d));
  }
  expect_agreement({2, 1, 2, 1, 32, 32}, options(0, 32));
  for (const int64_t L : {300, 320, 417, 432, 433}) expect_agreement({1, L, 2, 1, 64, 64}, options(0, 64));
  expect_agreement({7, 56, 6, 6, 64, 64}, options(0, 64));
  expect_agreement({7, 17, 6, 2, 32, 32}, options(0, 32));
  expect_agreement({3, 150, 4, 2, 64, 64}, options(48, 64));
}

// As one product gives them.
TEST(Attention, TakesColumnsOfOneTensor) {
  for (const auto& s : {Shape{7, 56, 6, 6, 64, 64},
                        {1, 17, 4, 2, 32, 32},
                        {5, 1, 2, 2, 32, 32},
                        {3, 150, 4, 2, 64, 64},
                        {2, 70, 2, 2, 16, 16},
                        {2, 600, 2, 2, 64, 64}}) {
    for (const int64_t chunk : {0, 48}) {
      const auto apart = [&](decltype(attention)* f) {
        return [=](const Tensors& in) {
          const auto heads = in[0].split_with_sizes({s.Hkv, s.Hkv, s.H}, 2);
          return from_zero(options(chunk, s.dk), f)({heads[2], heads[0], heads[1]});
        };
      };
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(::testing::Message()
                     << "B " << s.B << " L " << s.L << " chunk " << chunk << " " << type);
        testing::expect_agreement(apart(attention), apart(attention_reference),
                                  {testing::random({s.B, s.L, s.H + 2 * s.Hkv, s.dk}, type)});
      }
    }
  }
}

TEST(Attention, IsTheSameInEveryRun) {
  const auto once = [](const at::Tensor& x) {
    const auto q = x.detach().clone().set_requires_grad(true);
    const auto o = from_zero(options(0, 64), attention)({q, q, q})[0];
    return Tensors{o, torch::autograd::grad({o}, {q}, {x})[0]};
  };
  const auto x = testing::random({7, 130, 6, 64}, at::kBFloat16);
  const auto first = once(x), second = once(x);
  EXPECT_TRUE(at::equal(first[0], second[0]));
  EXPECT_TRUE(at::equal(first[1], second[1]));
}

TEST(Attention, EarlyKeysMayOutweighLaterOnesByFar) {
  auto x = inputs({1, 512, 1, 1, 256, 512}, at::kBFloat16);
  x[1].narrow(1, 3, 2).mul_(100);
  const auto o = options(512, 256);
  const auto d = [](const at::Tensor& t) { return t.to(at::kDouble); };
  const auto want = from_zero(o, attention_reference)({d(x[0]), d(x[1]), d(x[2])})[0];
  EXPECT_LE(testing::relative_error(from_zero(o, attention)(x)[0], want), 1.5e-2);
}

TEST(Attention, SeesEarlierChunks) {
  expect_agreement({2, 50, 2, 1, 8, 6}, options(8, 8, 1));
  expect_agreement({1, 41, 2, 2, 8, 20}, options(8, 8, 3));
}

TEST(Attention, DropsTheSameWeightsForwardAndBackward) {
  expect_agreement({2, 90, 2, 1, 8, 6}, options(64, 8, 0, 0.3));
  expect_agreement({1, 150, 2, 2, 8, 17}, options(0, 8, 0, 0.5));
  expect_agreement({1, 45, 2, 2, 8, 6}, options(16, 8, 1, 0.2));
}

TEST(Attention, DropoutKeepsTheMean) {
  const auto q = testing::random({1, 256, 2, 8}), v = at::ones_like(q).narrow(3, 0, 4);
  const auto start = starts({0});
  double mean = 0;
  auto o = options(0, 8, 0, 0.25);
  for (o.dropout_key = 0; o.dropout_key < 20; ++o.dropout_key)
    mean += attention(q, q, v, start, o).mean().item<double>() / 20;
  EXPECT_NEAR(mean, 1, 0.01);
  const auto once = attention(q, q, v, start, o);
  EXPECT_TRUE(at::equal(once, attention(q, q, v, start, o)));
  ++o.dropout_key;
  EXPECT_FALSE(at::equal(once, attention(q, q, v, start, o)));
}

// Feeds whole rows in calls of the given lengths; row b enters the stream at origin[b], a position where it
// sees nothing earlier. The cache is a ring.
at::Tensor in_pieces(const Tensors& x, const std::vector<int64_t>& origin,
                     const std::vector<int64_t>& lengths, int64_t C, const AttentionOptions& o) {
  AttentionCache cache{at::empty({x[1].size(0), C, x[1].size(2), x[1].size(3)}, x[1].options()),
                       at::empty({x[2].size(0), C, x[2].size(2), x[2].size(3)}, x[2].options())};
  cache.k.fill_(std::numeric_limits<double>::quiet_NaN());
  cache.v.fill_(std::numeric_limits<double>::quiet_NaN());
  Tensors out;
  int64_t t = 0;
  for (const int64_t n : lengths) {
    const auto q = x[0].narrow(1, t, n), k = x[1].narrow(1, t, n), v = x[2].narrow(1, t, n);
    auto start = starts(origin);
    start += t;
    out.push_back(attention(q, k, v, start, o, cache));
    const AttentionCache stored{cache.k.clone(), cache.v.clone()};
    EXPECT_TRUE(at::equal(attention_and_store(q, k, v, start, o, stored), out.back()));
    for (int64_t b = 0; b < x[0].size(0); ++b) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t slot = (origin[static_cast<std::size_t>(b)] + t + i) % C;
        cache.k[b][slot].copy_(k[b][i]);
        cache.v[b][slot].copy_(v[b][i]);
      }
    }
    EXPECT_TRUE(at::equal(stored.k.nan_to_num(), cache.k.nan_to_num()));
    EXPECT_TRUE(at::equal(stored.v.nan_to_num(), cache.v.nan_to_num()));
    t += n;
  }
  EXPECT_EQ(t, x[0].size(1));
  return at::cat(out, 1);
}

void expect_same_in_pieces(const Shape& s, const std::vector<int64_t>& origin,
                           const std::vector<int64_t>& lengths, int64_t C, const AttentionOptions& o) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const auto x = inputs(s, type);
    const auto pieces = in_pieces(x, origin, lengths, C, o);
    // In one call without a cache each row begins at the same distance from a border; rows one by one.
    for (int64_t b = 0; b < s.B; ++b) {
      const auto row = [&](const at::Tensor& t) { return t.narrow(0, b, 1); };
      const auto whole =
          attention(row(x[0]), row(x[1]), row(x[2]), starts({origin[static_cast<std::size_t>(b)]}), o);
      EXPECT_LE(testing::relative_error(row(pieces), whole), type == at::kFloat ? 2e-6 : 1.5e-2)
          << "row " << b << " " << type;
    }
  }
}

TEST(Attention, PiecesWithCacheEqualOneCall) {
  expect_same_in_pieces({1, 40, 2, 2, 8, 6}, {0}, {3, 7, 1, 1, 20, 8}, 16, options(16, 8));
  expect_same_in_pieces({3, 60, 4, 2, 16, 24}, {0, 64, 1000000000000}, {1, 1, 30, 5, 1, 22}, 8,
                        options(8, 16));
  expect_same_in_pieces({1, 40, 2, 1, 8, 40}, {0}, {10, 1, 1, 1, 17, 10}, 16, options(8, 8, 1));
  expect_same_in_pieces({1, 90, 1, 1, 8, 6}, {0}, {50, 1, 39}, 90, options(0, 8));
  expect_same_in_pieces({1, 40, 2, 2, 8, 6}, {0}, {9, 1, 30}, 16, options(16, 8, 0, 0.4));
  expect_same_in_pieces({3, 100, 6, 2, 64, 64}, {0, 64, 1000000000000}, {40, 1, 1, 30, 28}, 32,
                        options(32, 64));
  expect_same_in_pieces({1, 300, 2, 1, 64, 128}, {0}, {290, 1, 1, 8}, 512, options(0, 64));
  expect_same_in_pieces({1, 70, 2, 2, 128, 96}, {0}, {1, 36, 1, 1, 31}, 32, options(16, 128, 1));
  expect_same_in_pieces({1, 60, 1, 1, 256, 256}, {0}, {57, 1, 2}, 64, options(0, 256));
}

TEST(Attention, RowsAtDifferentPositionsShareABatch) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t L : {1, 2, 13}) {
      const auto o = options(8, 16);
      const auto x = inputs({7, L, 4, 2, 16, 24}, type);
      const AttentionCache cache{testing::random({7, 8, 2, 16}, type), testing::random({7, 8, 2, 24}, type)};
      const auto start = starts({0, 3, 7, 8, 1000000000005, 17, (1LL << 62) + 6});
      const auto got = attention(x[0], x[1], x[2], start, o, cache);
      EXPECT_TRUE(at::equal(got, attention(x[0], x[1], x[2], start, o, cache)));
      const auto columns =
          at::cat({x[1].flatten(2), x[2].flatten(2), x[0].flatten(2)}, 2).split_with_sizes({32, 48, 64}, 2);
      const auto heads = [&](std::size_t i, int64_t d) { return columns[i].unflatten(2, {-1, d}); };
      EXPECT_TRUE(at::equal(got, attention(heads(2, 16), heads(0, 16), heads(1, 24), start, o, cache)));
      const auto d = [](const at::Tensor& t) { return t.to(at::kDouble); };
      const auto want =
          attention_reference(d(x[0]), d(x[1]), d(x[2]), start, o, AttentionCache{d(cache.k), d(cache.v)});
      EXPECT_LE(testing::relative_error(got, want), type == at::kFloat ? 2e-6 : 1.5e-2) << L << type;
    }
  }
}

TEST(Attention, GradientsMeetFiniteDifferences) {
  for (const auto& o : {options(3, 4), options(0, 4), options(3, 4, 1), options(3, 4, 0, 0.3)}) {
    testing::expect_gradients(from_zero(o, attention), inputs({2, 7, 2, 1, 4, 3}, at::kDouble));
  }
}

TEST(Attention, NamesWhatDoesNotFit) {
  // On the CPU: positions are looked at there alone.
  const auto zeros = [](at::IntArrayRef shape) { return at::zeros(shape); };
  const auto starts = [](const std::vector<int64_t>& start) { return at::tensor(start, at::kLong); };
  const auto x = zeros({2, 3, 4, 8}), zero = starts({0, 0});
  testing::expect_error([&] { attention(x, zeros({2, 3, 3, 8}), x, zero, {}); },
                        "[attention] k: expected a number of heads that divides those of q, got 3 and 4");
  testing::expect_error([&] { attention(x, zeros({2, 3, 4, 7}), x, zero, {}); },
                        "[attention] k: expected shape [2, 3, any, 8], got [2, 3, 4, 7]");
  testing::expect_error([&] { attention(x, x, zeros({2, 4, 4, 8}), zero, {}); },
                        "[attention] v: expected shape [2, 3, 4, any], got [2, 4, 4, 8]");
  testing::expect_error([&] { attention(x, x, x.to(at::kBFloat16), zero, {}); },
                        "[attention] v: expected Float, got BFloat16");
  testing::expect_error([&] { attention(x.to(at::kHalf), x, x, zero, {}); },
                        "[attention] q: float16 is not supported");
  testing::expect_error([&] { attention(x, x, x, starts({8, 9}), {.chunk = 8}); },
                        "[attention] start: row 1: position 9 sees 1 earlier keys: expected them in a cache");
  testing::expect_error([&] { attention(x, x, x, starts({0, -1}), {.chunk = 8}); },
                        "[attention] start: row 1: expected a position >= 0, got -1");
  testing::expect_error([&] { attention(x, x, x, zero, {.chunk = -1}); }, "[attention] chunk: expected");
  testing::expect_error([&] { attention(x, x, x, zero, {.dropout = 1}); }, "[attention] dropout: expected");
  const AttentionCache cache{zeros({2, 4, 4, 8}), zeros({2, 4, 4, 8})};
  testing::expect_error(
      [&] { attention(x, x, x, starts({0, 13}), {.chunk = 8}, cache); },
      "[attention] cache: row 1: position 13 sees 5 earlier keys: expected at least as many "
      "slots, got 4");
  testing::expect_error(
      [&] { attention(x.clone().set_requires_grad(true), x, x, zero, {.chunk = 8}, cache); },
      "[attention] cache: expected none where gradients are wanted, got one");
}

}  // namespace
}  // namespace megalodon::ops
