#include "generate/greedy.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>

#include "base/error.h"
#include "base/random.h"

namespace megalodon::generate {
namespace {
using Tokens = std::vector<std::int32_t>;

constexpr int64_t kVocabulary = 23;

std::unique_ptr<model::LanguageModel> megalodon_model() {
  model::MegalodonConfig c;
  c.vocab_size = kVocabulary;
  c.num_layers = 2;
  c.model_dim = 16;
  c.num_heads = 2;
  c.z_dim = 8;
  c.value_dim = 16;
  c.ffn_hidden_dim = 16;
  c.cema_ndim = 4;
  c.chunk_size = 8;
  c.norm_num_groups = 4;
  return model::make_model(c, 11);
}

std::unique_ptr<model::LanguageModel> llama_model() {
  model::LlamaConfig c;
  c.vocab_size = kVocabulary;
  c.num_hidden_layers = 2;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 6;
  c.position_embedding = "none";
  c.initializer_range = 0;
  return model::make_model(c, 11);
}

// A stack of models without weights: the next token is a function of all tokens read and of the model.
class Hashes : public model::LanguageModel {
 public:
  explicit Hashes(std::vector<int64_t> multipliers)
      : LanguageModel(config()), multipliers_(std::move(multipliers)) {}
  int64_t stack() const override { return static_cast<int64_t>(multipliers_.size()); }
  at::Tensor hidden(const at::Tensor& tokens, model::StreamState* state, model::DropoutKeys*) const override {
    const int64_t B = tokens.size(0), L = tokens.size(1);
    auto fresh = fresh_state(B, L);
    auto& hash = (state != nullptr ? *state : fresh).tensors.at("hash");  // [B]
    hash = hash.clone();
    auto h = at::empty({B, L, 1});
    for (int64_t b = 0; b < B; ++b) {
      auto value = hash[b].item<int64_t>();
      for (int64_t t = 0; t < L; ++t) {
        const int64_t multiplier = multipliers_[static_cast<std::size_t>(b / (B / stack()))];
        value = (value * multiplier + tokens[b][t].item<int64_t>() + 1) % 1009;
        h[b][t][0] = value;
      }
      hash[b] = value;
    }
    if (state != nullptr) state->advance(L);
    return h;
  }
  at::Tensor logits(const at::Tensor& hidden) const override {
    const auto distance = (hidden.remainder(kVocabulary) - at::arange(kVocabulary)).abs();
    return -distance * (1 + hidden / 1009);
  }
  model::StreamState fresh_state(int64_t batch, int64_t) const override {
    return {"hashes", at::zeros({batch}, at::kLong), {{"hash", at::zeros({batch}, at::kLong)}}};
  }

 private:
  static model::LlamaConfig config() {
    model::LlamaConfig c;
    c.vocab_size = kVocabulary;
    return c;
  }
  std::vector<int64_t> multipliers_;
};

// The definition: the whole sequence anew for every token, one prompt at a time.
Answer plain_answer(const model::LanguageModel& model, const Tokens& prompt, const GreedyOptions& options) {
  const at::NoGradGuard no_grad;
  Answer answer;
  double sum = 0;
  auto sequence = prompt;
  for (int64_t i = 0; i < options.bound && !answer.ended; ++i) {
    const auto tokens = at::tensor(sequence, at::kLong).unsqueeze(0);
    const auto log_probability = at::log_softmax(model.forward(tokens)[0][tokens.size(1) - 1], -1);
    const auto token = log_probability.argmax().item<int64_t>();
    sum += log_probability[token].item<double>();
    answer.ended = token == options.end;
    sequence.push_back(static_cast<std::int32_t>(token));
    if (!answer.ended) answer.tokens.push_back(static_cast<std::int32_t>(token));
  }
  answer.mean_log_probability = sum / static_cast<double>(sequence.size() - prompt.size());
  return answer;
}

std::vector<Tokens> random_prompts(std::size_t count, std::size_t shortest, std::size_t longest,
                                   uint64_t seed) {
  std::vector<Tokens> prompts;
  Random random(seed, Purpose::test, 0);
  for (std::size_t i = 0; i < count; ++i) {
    Tokens prompt(shortest + random.below(longest - shortest + 1));
    for (auto& token : prompt) token = static_cast<std::int32_t>(random.below(kVocabulary));
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

void expect_equal(const Answer& got, const Answer& expected, const std::string& where) {
  EXPECT_EQ(got.tokens, expected.tokens) << where;
  EXPECT_EQ(got.ended, expected.ended) << where;
  EXPECT_NEAR(got.mean_log_probability, expected.mean_log_probability, 1e-5) << where;
}

// The answers of one model, each compared with the definition. Returns how many ended.
int64_t check_against_definition(const model::LanguageModel& model, const std::vector<Tokens>& prompts,
                                 const GreedyOptions& options) {
  const auto answers = GreedyDecoder(model).answer(prompts, options);
  EXPECT_EQ(answers.size(), 1u);
  EXPECT_EQ(answers[0].size(), prompts.size());
  int64_t ended = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    expect_equal(answers[0][i], plain_answer(model, prompts[i], options), "prompt " + std::to_string(i));
    ended += answers[0][i].ended ? 1 : 0;
  }
  return ended;
}

TEST(Greedy, GivesWhatTheWholeSequenceGives) {
  for (const auto& model : {megalodon_model(), llama_model()}) {
    const auto prompts = random_prompts(40, 1, 6, 3);
    GreedyOptions options{.end = -1, .bound = 12, .batch = 7};
    EXPECT_EQ(check_against_definition(*model, prompts, options), 0);
    options.end = plain_answer(*model, prompts[0], options).tokens[4];
    for (const int64_t batch : {1, 7, 512}) {
      options.batch = batch;
      const auto ended = check_against_definition(*model, prompts, options);
      EXPECT_GT(ended, 3);  // some end, early and late, and some do not
      EXPECT_LT(ended, 40);
    }
  }
}

TEST(Greedy, StopsAtTheBound) {
  for (const auto& model : {megalodon_model(), llama_model()}) {
    const auto prompts = random_prompts(9, 3, 4, 5);
    GreedyOptions options{.end = -1, .bound = 1};
    EXPECT_EQ(check_against_definition(*model, prompts, options), 0);
    options.end = plain_answer(*model, prompts[0], options).tokens[0];
    EXPECT_GE(check_against_definition(*model, prompts, options), 1);
    options.bound = 90;  // beyond the caches' first capacity
    options.end = -1;
    EXPECT_EQ(check_against_definition(*model, prompts, options), 0);
  }
}

TEST(Greedy, AllMayEndAtOnce) {
  const auto model = llama_model();
  const auto prompts = std::vector<Tokens>(5, random_prompts(1, 4, 4, 2)[0]);
  GreedyOptions options{.end = -1, .bound = 6};
  options.end = plain_answer(*model, prompts[0], options).tokens[2];
  EXPECT_EQ(check_against_definition(*model, prompts, options), 5);
}

TEST(Greedy, AnswersOfAStackAreThoseOfItsModels) {
  const std::vector<int64_t> multipliers{3, 7, 30};
  const Hashes stack(multipliers);
  const auto prompts = random_prompts(50, 2, 3, 8);
  for (const int64_t batch : {1, 11, 64}) {
    for (const int64_t bound : {1, 40}) {
      const GreedyOptions options{.end = 5, .bound = bound, .batch = batch};
      const auto answers = GreedyDecoder(stack).answer(prompts, options);
      ASSERT_EQ(answers.size(), 3u);
      for (std::size_t k = 0; k < 3; ++k) {
        const Hashes alone({multipliers[k]});
        for (std::size_t i = 0; i < prompts.size(); ++i)
          expect_equal(answers[k][i], plain_answer(alone, prompts[i], options), std::to_string(i));
      }
    }
  }
}

TEST(Greedy, RepeatsItself) {
  const auto model = llama_model();
  model->set_compute_type(at::kBFloat16);
  const auto prompts = random_prompts(30, 2, 5, 1);
  const GreedyOptions options{.end = 2, .bound = 15, .batch = 8};
  const auto first = GreedyDecoder(*model).answer(prompts, options),
             second = GreedyDecoder(*model).answer(prompts, options);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(first[0][i].tokens, second[0][i].tokens);
    EXPECT_EQ(first[0][i].mean_log_probability, second[0][i].mean_log_probability);
  }
}

TEST(Greedy, RefusesWhatItCannotAnswer) {
  const auto model = llama_model();
  EXPECT_TRUE(GreedyDecoder(*model).answer({}, {.bound = 3})[0].empty());
  const std::vector<Tokens> prompts{{1, 2}, {}};
  EXPECT_THROW(GreedyDecoder(*model).answer(prompts, {.bound = 3}), Error);
  auto weight = model->parameters()[0].value;
  const at::NoGradGuard no_grad;
  weight.fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_THROW(GreedyDecoder(*model).answer(random_prompts(2, 2, 2, 1), {.bound = 3}), Error);
}

}  // namespace
}  // namespace megalodon::generate
