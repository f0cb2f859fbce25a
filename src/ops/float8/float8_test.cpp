#include "ops/float8/float8.h"

#include <gtest/gtest.h>

#include <limits>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {

bool on_gpu_without_units() {
  return testing::device().is_cuda() && !has_float8_units(testing::random({1}));
}

at::Tensor bytes(const at::Tensor& x) {
  return x.view(at::kByte).cpu();
}

// Bit for bit what torch's own cast gives on the CPU, both ways round; whole tiles and parts of them.
TEST(Float8, CastIsTorchsOfTheScaledNumbers) {
  if (on_gpu_without_units()) GTEST_SKIP() << "no units for float8";
  for (const auto& [R, C] :
       {std::pair<int64_t, int64_t>{16, 16}, {128, 64}, {48, 208}, {272, 80}, {1024, 4864}}) {
    for (const auto type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
      for (const double size : {1e-6, 1.0, 3e4}) {
        SCOPED_TRACE(at::str(R, " x ", C, " ", type, " ", size));
        auto x = testing::random({R, C}) * size;
        x[R / 2].fill_(0);
        const auto x_ = x.to(at::kBFloat16);
        const auto want = to_float8_reference(x_.cpu(), type, true, true);
        Float8 both, rows, columns;
        {
          const testing::PoisonedMemory poisoned;
          both = to_float8(x_, type, true, true);
          rows = to_float8(x_, type, true, false);
          columns = to_float8(x_, type, false, true);
        }
        EXPECT_TRUE(at::equal(both.scale.cpu(), want.scale));
        EXPECT_TRUE(at::equal(bytes(both.rows), bytes(want.rows)));
        EXPECT_TRUE(at::equal(bytes(both.columns), bytes(want.columns)));
        EXPECT_TRUE(at::equal(bytes(rows.rows), bytes(want.rows)) && !rows.columns.defined());
        EXPECT_TRUE(at::equal(bytes(columns.columns), bytes(want.columns)) && !columns.rows.defined());
        const double rounding = type == at::kFloat8_e4m3fn ? 0.04 : 0.08;
        EXPECT_LE(testing::relative_error(both.rows.to(at::kFloat) * both.scale, x_), rounding);
      }
    }
  }
}

TEST(Float8, OfZerosIsZeroAndOfWhatIsNotFiniteNothing) {
  if (on_gpu_without_units()) GTEST_SKIP() << "no units for float8";
  const auto x = at::zeros({16, 32}, at::device(testing::device()).dtype(at::kBFloat16));
  EXPECT_EQ(to_float8(x, at::kFloat8_e4m3fn, true, false).rows.to(at::kFloat).abs().max().item<float>(), 0);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    auto y = x.clone();
    y[3][5] = bad;
    for (const auto type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2})
      EXPECT_TRUE(to_float8(y, type, false, true).columns.to(at::kFloat).isnan().all().item<bool>());
  }
}

TEST(Float8, ProductAgreesWithTheSameInFloat64) {
  if (on_gpu_without_units()) GTEST_SKIP() << "no units for float8";
  for (const auto& [M, N, K] : {std::array<int64_t, 3>{16, 16, 16}, {48, 80, 112}, {512, 256, 384}}) {
    for (const auto a_type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        for (const bool more : {false, true}) {
          SCOPED_TRACE(at::str(M, " ", N, " ", K, " ", a_type, " ", type, more ? " more" : ""));
          const auto a = to_float8(testing::random({M, K}, at::kBFloat16), a_type, true, false),
                     b = to_float8(testing::random({N, K}, at::kBFloat16) * 7, at::kFloat8_e4m3fn, true,
                                   false);
          Float8ProductOptions o{.type = type};
          const auto bias = testing::random({N}, at::kBFloat16), added = testing::random({M, N}, type);
          auto want = at::mm(a.rows.cpu().to(at::kDouble), b.rows.cpu().to(at::kDouble).t()) *
                      a.scale.cpu().to(at::kDouble) * b.scale.cpu().to(at::kDouble);
          if (more) {
            if (type == at::kBFloat16) {
              o.bias = bias;
              want = want + bias.cpu().to(at::kDouble);
            }
            o.added = added;
            want = want + added.cpu().to(at::kDouble);
          }
          const auto got = float8_product(a.rows, a.scale, b.rows, b.scale, o);
          EXPECT_EQ(got.scalar_type(), type);
          // The units keep products to some 14 bits below the largest of a sum.
          EXPECT_LE(testing::relative_error(got, want), type == at::kFloat ? 1e-3 : 4e-3);
        }
      }
    }
  }
}

TEST(Float8, NamesWhatDoesNotFit) {
  const auto x = at::zeros({16, 16}).to(at::kFloat8_e4m3fn), one = at::ones({});
  testing::expect_error([&] { to_float8(at::zeros({2, 2}), at::kBFloat16, true, false); },
                        "[to_float8] type: expected Float8_e4m3fn or Float8_e5m2, got BFloat16");
  testing::expect_error(
      [&] { float8_product(x, one, at::zeros({16, 32}).to(at::kFloat8_e4m3fn), one, {at::kFloat}); },
      "[float8_product] b: expected shape [any, 16], got [16, 32]");
  testing::expect_error([&] { float8_product(at::zeros({16, 16}), one, x, one, {at::kFloat}); },
                        "[float8_product] a: expected a matrix of float8, got Float [16, 16]");
}

}  // namespace
}  // namespace megalodon::ops
