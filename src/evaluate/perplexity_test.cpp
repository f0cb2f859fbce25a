#include "evaluate/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/random.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::evaluate {
namespace {

std::unique_ptr<model::LanguageModel> tiny_model() {
  model::MegalodonConfig c;
  c.vocab_size = 30;
  c.num_layers = 2;
  c.model_dim = 16;
  c.z_dim = 8;
  c.value_dim = 16;
  c.ffn_hidden_dim = 16;
  c.cema_ndim = 4;
  c.chunk_size = 8;
  c.norm_num_groups = 4;
  return model::make_model(c, 11);
}

std::vector<int32_t> random_tokens(std::size_t n) {
  Random random(4, Purpose::test, 0);
  std::vector<int32_t> tokens(n);
  for (auto& token : tokens) token = static_cast<int32_t>(random.below(30));
  return tokens;
}

double loss_of(const model::LanguageModel& model, std::span<const int32_t> window, int64_t targets) {
  const at::NoGradGuard no_grad;
  const auto n = static_cast<int64_t>(window.size());
  const auto ids = at::tensor(std::vector<int64_t>(window.begin(), window.end())).view({1, n});
  const auto logits = model.forward(ids.narrow(1, 0, n - 1)).view({n - 1, -1});
  return ops::cross_entropy(logits, ids.view(-1).narrow(0, 1, n - 1))
      .narrow(0, n - 1 - targets, targets)
      .mean()
      .item<double>();
}

TEST(Perplexity, ScoresTheSameTargetsAtEachContext) {
  const auto model = tiny_model();
  const auto tokens = random_tokens(500);
  const PerplexityOptions options{.contexts = {16, 64, 200}, .targets = 10, .windows = 2};
  const auto results = perplexity_by_context(*model, tokens, options, [](const auto&) {});
  ASSERT_EQ(results.size(), 3u);
  for (const auto& r : results) {
    EXPECT_EQ(r.tokens, 20);
    EXPECT_EQ(r.targets, results[0].targets);
    double expected = 0;
    for (const std::size_t end : {std::size_t{200}, std::size_t{500}}) {
      const auto context = static_cast<std::size_t>(r.context);
      expected += loss_of(*model, std::span(tokens).subspan(end - context, context), 10) / 2;
    }
    EXPECT_NEAR(r.loss, expected, 1e-4) << r.context;
  }
}

TEST(Perplexity, NamesWhatCannotBe) {
  const auto model = tiny_model();
  const auto tokens = random_tokens(50);
  EXPECT_THROW(perplexity_by_context(*model, tokens, {.contexts = {64}}, [](const auto&) {}), Error);
  EXPECT_THROW(perplexity_by_context(*model, tokens, {.contexts = {}}, [](const auto&) {}), Error);
}

TEST(Stream, LossIsThatOfOneCall) {
  const auto model = tiny_model();
  const auto tokens = random_tokens(301);
  double sum = 0;
  int64_t last = 0;
  stream_document(*model, tokens, 70, {}, [&](const StreamPoint& point) {
    sum += point.loss * static_cast<double>(point.position - last);
    last = point.position;
    EXPECT_GT(point.resident_bytes, 0);
  });
  EXPECT_EQ(last, 300);
  EXPECT_NEAR(sum / 300, loss_of(*model, tokens, 300), 1e-4);
}

}  // namespace
}  // namespace megalodon::evaluate
