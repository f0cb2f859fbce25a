#include "ops/linear_add/linear_add.h"

#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {

// The result is a new tensor, and the operands stay as they are; the last shape is that of whole tiles.
TEST(LinearAdd, AgreesWithReference) {
  struct Case {
    int64_t K, R, in, out;  // K = 0: no stack
  };
  for (const auto& [K, R, in, out] :
       {Case{0, 1, 1, 1}, {0, 5, 8, 3}, {0, 33, 40, 24}, {2, 6, 7, 9}, {0, 512, 256, 384}}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(at::str(K, " x ", R, " x ", in, " x ", out, " ", type));
      const auto of = [&, k = K, t = type](int64_t rows, int64_t columns) {
        const auto x = testing::random({std::max<int64_t>(k, 1), rows, columns}, t);
        return k == 0 ? x.squeeze(0) : x;
      };
      const auto x = of(R, in), weight = of(out, in), added = of(R, out), before = added.clone();
      at::Tensor y;
      {
        const testing::PoisonedMemory poisoned;
        y = linear_add(x, weight, added);
      }
      const auto want =
          linear_add_reference(x.to(at::kDouble), weight.to(at::kDouble), added.to(at::kDouble));
      EXPECT_LE(testing::relative_error(y, want), type == at::kFloat ? 2e-6 : 4e-3);
      EXPECT_TRUE(at::equal(added, before));
    }
  }
}

// Rows and results that begin somewhere in memory, as parts of others do.
TEST(LinearAdd, TakesOperandsAnywhere) {
  const auto x = testing::random({9, 17}, at::kBFloat16).narrow(1, 1, 16),
             weight = testing::random({25, 16}, at::kBFloat16).narrow(0, 1, 24),
             added = testing::random({10, 24}, at::kBFloat16).narrow(0, 1, 9);
  const auto want = linear_add_reference(x.to(at::kDouble), weight.to(at::kDouble), added.to(at::kDouble));
  EXPECT_LE(testing::relative_error(linear_add(x, weight, added), want), 4e-3);
}

TEST(LinearAdd, NamesWhatDoesNotFit) {
  const auto x = at::zeros({3, 4}), weight = at::zeros({5, 4});
  testing::expect_error([&] { linear_add(x, at::zeros({5, 3}), at::zeros({3, 5})); },
                        "[linear_add] weight: expected shape [any, 4], got [5, 3]");
  testing::expect_error([&] { linear_add(x, weight, at::zeros({3, 4})); },
                        "[linear_add] added: expected shape [3, 5], got [3, 4]");
  testing::expect_error([&] { linear_add(x, weight, at::zeros({3, 5}, at::kDouble)); },
                        "[linear_add] added: expected Float, got Double");
}

}  // namespace
}  // namespace megalodon::ops
