#include "train/training_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <limits>

#include "ops/testing.h"

namespace megalodon::train {
namespace {
namespace testing = ops::testing;

std::unique_ptr<model::LanguageModel> stacked_llama() {
  model::LlamaConfig c;
  c.vocab_size = 20;
  c.num_hidden_layers = 2;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_attention_heads = 2;
  c.num_key_value_heads = 2;
  c.head_dim = 16;
  auto model = model::make_stack(c, {1, 2});
  model->to(testing::device());
  return model;
}

at::Tensor tokens(int64_t N, int64_t L) {
  return (testing::random({N, L}).abs() * 1000).to(at::kLong).remainder(20);
}

// A step that met its shape before (and is replayed, on a CUDA device) against one that never did.
TEST(TrainingStep, IsTheSameWhenItsShapeComesAgain) {
  const auto model = stacked_llama(), other = stacked_llama();
  AdamW optimizer(model->parameters(), {}, 2), other_optimizer(other->parameters(), {}, 2);
  TrainingStep step(*model, optimizer);
  auto version = model->parameters()[0].value._version();
  for (int t = 0; t < 8; ++t) {
    const int64_t N = t % 3 == 2 ? 6 : 4, L = t % 2 == 0 ? 9 : 12;
    const auto in = tokens(N, L), out = tokens(N, L);
    const auto got = step(in, out, 1e-2);
    const auto expected = TrainingStep(*other, other_optimizer)(in, out, 1e-2);
    ASSERT_FALSE(got.skipped);
    ASSERT_GT(model->parameters()[0].value._version(), version);  // what was derived from the weights is old
    version = model->parameters()[0].value._version();
    for (std::size_t k = 0; k < 2; ++k) {
      EXPECT_NEAR(got.losses[k], expected.losses[k], 1e-5) << "step " << t;
      EXPECT_NEAR(got.gradient_norms[k], expected.gradient_norms[k], 1e-4) << "step " << t;
    }
  }
  for (std::size_t i = 0; i < model->parameters().size(); ++i) {
    EXPECT_LE(testing::relative_error(model->parameters()[i].value, other->parameters()[i].value), 1e-4)
        << model->parameters()[i].name;
  }
}

TEST(TrainingStep, ChangesNothingWhereTheLossIsNotFinite) {
  const auto model = stacked_llama();
  AdamW optimizer(model->parameters(), {}, 2);
  TrainingStep step(*model, optimizer);
  const auto in = tokens(4, 5), out = tokens(4, 5);
  auto& first = model->parameters()[0].value;
  const auto kept = first.detach().clone();
  {
    const at::NoGradGuard no_grad;
    at::Tensor(first).fill_(std::numeric_limits<float>::infinity());
  }
  for (int t = 0; t < 3; ++t) EXPECT_TRUE(step(in, out, 1e-2).skipped);
  {
    const at::NoGradGuard no_grad;
    at::Tensor(first).copy_(kept);
  }
  const auto outcome = step(in, out, 1e-2);
  EXPECT_FALSE(outcome.skipped);
  EXPECT_FALSE(at::equal(first.detach(), kept));
}

}  // namespace
}  // namespace megalodon::train
