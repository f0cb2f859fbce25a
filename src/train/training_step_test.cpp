#include "train/training_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "ops/cross_entropy/cross_entropy.h"
#include "ops/testing.h"

namespace megalodon::train {
namespace {
namespace testing = ops::testing;

std::unique_ptr<model::LanguageModel> stacked_llama(const std::string& positions = "rope") {
  model::LlamaConfig c;
  c.position_embedding = positions;
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
    const auto got = step({in, out, {}}, 1e-2);
    const auto expected = TrainingStep(*other, other_optimizer)({in, out, {}}, 1e-2);
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

// What the optimizer writes beside the weights is what they are rounded to, in steps that are replayed too,
// and after weights were changed from outside.
TEST(TrainingStep, KeepsRoundedWeightsUpToDate) {
  const auto model = stacked_llama(), other = stacked_llama();
  for (const auto& m : {model.get(), other.get()}) m->set_compute_type(at::kBFloat16);
  AdamW optimizer(model->parameters(), {}, 2), other_optimizer(other->parameters(), {}, 2);
  TrainingStep step(*model, optimizer);
  const auto in = tokens(4, 9), out = tokens(4, 9);
  for (int t = 0; t < 6; ++t) {
    if (t == 3) {
      const at::NoGradGuard no_grad;
      for (const auto& m : {model.get(), other.get()})
        for (const auto& p : m->parameters()) at::Tensor(p.value).mul_(0.5);
    }
    const auto got = step({in, out, {}}, 1e-2);
    const auto expected = TrainingStep(*other, other_optimizer)({in, out, {}}, 1e-2);
    for (std::size_t k = 0; k < 2; ++k) EXPECT_NEAR(got.losses[k], expected.losses[k], 1e-3) << "step " << t;
    for (const auto& p : model->parameters()) {
      if (!p.rounded) continue;
      const auto copy = p.rounded->of(p.value, at::kBFloat16);
      ASSERT_TRUE(copy.defined()) << p.name << " step " << t;
      EXPECT_TRUE(at::equal(copy, p.value.detach().to(at::kBFloat16))) << p.name << " step " << t;
    }
  }
}

// Rows that end at different places: padded, and packed in a row for each model.
std::pair<Batch, Batch> both_ways(const std::vector<int64_t>& lengths) {
  const auto N = static_cast<int64_t>(lengths.size());
  const auto L = std::ranges::max(lengths), K = int64_t{2};
  Batch padded{tokens(N, L), tokens(N, L), {}};
  std::vector<at::Tensor> in, out;
  std::vector<int32_t> borders{0};
  for (int64_t i = 0; i < N; ++i) {
    const int64_t n = lengths[static_cast<std::size_t>(i)];
    padded.targets[i].narrow(0, n, L - n).fill_(ops::kIgnoredTarget);
    in.push_back(padded.tokens[i].narrow(0, 0, n));
    out.push_back(padded.targets[i].narrow(0, 0, n));
    borders.push_back(borders.back() + static_cast<int32_t>(n));
  }
  const Batch packed{at::cat(in).view({K, -1}), at::cat(out).view({K, -1}),
                     ops::Sequences{at::tensor(borders, at::kInt), L}};
  return {padded, packed};
}

TEST(TrainingStep, IsTheSameForPackedSequences) {
  const auto model = stacked_llama("none"), other = stacked_llama("none");
  for (const auto& m : {model.get(), other.get()})
    m->set_compute_type(testing::device().is_cuda() ? at::kBFloat16 : at::kFloat);
  ASSERT_TRUE(model->packs());
  AdamW optimizer(model->parameters(), {}, 2), other_optimizer(other->parameters(), {}, 2);
  TrainingStep step(*model, optimizer), other_step(*other, other_optimizer);
  const double tolerance = testing::device().is_cuda() ? 2e-2 : 1e-5;
  for (int t = 0; t < 8; ++t) {
    const auto [padded, packed] =
        both_ways(t % 2 == 0 ? std::vector<int64_t>{3, 17, 6, 14} : std::vector<int64_t>{9, 1, 4, 5, 5, 4});
    const auto got = step(packed, 1e-3), expected = other_step(padded, 1e-3);
    for (std::size_t k = 0; k < 2; ++k) {
      EXPECT_NEAR(got.losses[k], expected.losses[k], tolerance) << "step " << t;
      EXPECT_NEAR(got.gradient_norms[k], expected.gradient_norms[k], 10 * tolerance) << "step " << t;
    }
  }
  EXPECT_FALSE(stacked_llama()->packs());  // rotary positions count by rows
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
  for (int t = 0; t < 3; ++t) EXPECT_TRUE(step({in, out, {}}, 1e-2).skipped);
  {
    const at::NoGradGuard no_grad;
    at::Tensor(first).copy_(kept);
  }
  const auto outcome = step({in, out, {}}, 1e-2);
  EXPECT_FALSE(outcome.skipped);
  EXPECT_FALSE(at::equal(first.detach(), kept));
}

}  // namespace
}  // namespace megalodon::train
