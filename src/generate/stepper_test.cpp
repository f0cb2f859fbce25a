#include "generate/stepper.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "ops/testing.h"

namespace megalodon::generate {
namespace {
namespace testing = ops::testing;

model::MegalodonConfig small_megalodon() {
  model::MegalodonConfig c;
  c.vocab_size = 50;
  c.num_layers = 2;
  c.model_dim = 64;
  c.num_heads = 2;
  c.z_dim = 32;
  c.value_dim = 96;
  c.ffn_hidden_dim = 80;
  c.swiglu = true;
  c.cema_ndim = 8;
  c.chunk_size = 16;
  c.norm_num_groups = 8;
  return c;
}

model::LlamaConfig small_llama() {
  model::LlamaConfig c;
  c.vocab_size = 50;
  c.num_hidden_layers = 2;
  c.hidden_size = 64;
  c.intermediate_size = 96;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 16;
  return c;
}

// Prompts that end inside a chunk, at its end, and after more than one; then single tokens over the borders
// of chunks and of the baseline's caches, which grow on the way.
TEST(Stepper, GivesTheLogitsOfOneCall) {
  const at::NoGradGuard no_grad;
  constexpr int64_t B = 3, L = 90;
  for (const auto& config : {model::ModelConfig(small_megalodon()), model::ModelConfig(small_llama())}) {
    const auto model = model::make_model(config, 3);
    model->to(testing::device());
    const auto tokens = (testing::random({B, L}).abs() * 1000).to(at::kLong).remainder(50);
    const auto whole = model->forward(tokens);  // [B, L, V]
    for (const int64_t prompt : {1, 5, 16, 41}) {
      SCOPED_TRACE(at::str(model::model_type(config), ", prompt ", prompt));
      auto state = model->fresh_state(B, 1);
      EXPECT_LE(testing::relative_error(model->next_logits(tokens.narrow(1, 0, prompt), state),
                                        whole.select(1, prompt - 1)),
                1e-5);
      Stepper stepper(*model);
      for (int64_t t = prompt; t < L; ++t) {
        const auto logits = stepper.step(tokens.select(1, t), state);
        ASSERT_LE(testing::relative_error(logits, whole.select(1, t)), 1e-5) << "token " << t;
        ASSERT_EQ(state.common_position(), t + 1);
        ASSERT_TRUE(state.position.eq(t + 1).all().item<bool>());
      }
    }
  }
}

// Recorded in bfloat16, whose intermediate results take each other's memory, a step of Megalodon gives what
// its operators one by one give.
TEST(Stepper, FollowsTheOperatorsInBfloat16) {
  const at::NoGradGuard no_grad;
  auto config = small_megalodon();
  config.model_dim = 128, config.num_heads = 2, config.z_dim = 64, config.value_dim = 256;
  config.ffn_hidden_dim = 192, config.num_layers = 3;
  for (const bool swiglu : {false, true}) {
    config.swiglu = swiglu;
    const auto model = model::make_model(config, 3);
    model->set_compute_type(at::kBFloat16);
    model->to(testing::device());
    for (const int64_t B : {1, 3, 8}) {
      SCOPED_TRACE(at::str(B, " streams", swiglu ? ", SwiGLU" : ""));
      const auto tokens = (testing::random({B, 40}).abs() * 1000).to(at::kLong).remainder(50);
      auto state = model->fresh_state(B, 1), alone = state.fork();
      Stepper stepper(*model);
      for (int64_t t = 0; t < tokens.size(1); ++t) {
        const auto next = tokens.select(1, t);
        ASSERT_LE(
            testing::relative_error(stepper.step(next, state), model->next_logits(next.unsqueeze(1), alone)),
            3e-2)
            << "token " << t;
      }
    }
  }
}

TEST(Stepper, ReadsAnewInTheTensorsOfAStateBefore) {
  const at::NoGradGuard no_grad;
  for (const auto& config : {model::ModelConfig(small_megalodon()), model::ModelConfig(small_llama())}) {
    const auto model = model::make_model(config, 3);
    model->to(testing::device());
    const auto tokens = (testing::random({2, 30}).abs() * 1000).to(at::kLong).remainder(50);
    Stepper stepper(*model);
    for (int reading = 0; reading < 3; ++reading) {
      SCOPED_TRACE(at::str(model::model_type(config), ", reading ", reading));
      const auto of_reading = tokens.roll(reading, 1);
      const auto whole = model->forward(of_reading);
      auto state = stepper.fresh_state(2, 32);
      EXPECT_LE(testing::relative_error(model->next_logits(of_reading.narrow(1, 0, 20), state),
                                        whole.select(1, 19)),
                1e-5);
      stepper.take_over(state);
      for (int64_t t = 20; t < 30; ++t)
        ASSERT_LE(testing::relative_error(stepper.step(of_reading.select(1, t), state), whole.select(1, t)),
                  1e-5);
    }
  }
}

TEST(Stepper, GoesOnInAnotherState) {
  const at::NoGradGuard no_grad;
  const auto model = model::make_model(small_megalodon(), 3);
  model->to(testing::device());
  const auto tokens = at::arange(2, at::TensorOptions(testing::device()).dtype(at::kLong));
  Stepper stepper(*model);
  auto first = model->fresh_state(2);
  for (int i = 0; i < 3; ++i) stepper.step(tokens, first);
  auto second = first.fork(), third = first.select({1});
  const auto expected = stepper.step(tokens, first).clone();
  EXPECT_LE(testing::relative_error(stepper.step(tokens, second), expected), 1e-6);
  EXPECT_LE(testing::relative_error(stepper.step(tokens.narrow(0, 1, 1), third), expected.narrow(0, 1, 1)),
            1e-6);
}

}  // namespace
}  // namespace megalodon::generate
