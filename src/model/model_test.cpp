#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <filesystem>

#include "base/random.h"
#include "base/testing.h"
#include "model/gated_projection.h"
#include "model/language_model.h"
#include "model/projection.h"
#include "model/streaming.h"
#include "ops/add_rms_norm/add_rms_norm.h"
#include "ops/cross_entropy/cross_entropy.h"
#include "ops/float8/float8.h"
#include "ops/joined.h"
#include "ops/swiglu/swiglu.h"
#include "ops/testing.h"

namespace megalodon::model {
namespace {

MegalodonConfig small_megalodon() {
  MegalodonConfig c;
  c.vocab_size = 50;
  c.num_layers = 2;
  c.model_dim = 24;
  c.num_heads = 2;
  c.z_dim = 8;
  c.value_dim = 32;
  c.ffn_hidden_dim = 40;
  c.cema_ndim = 4;
  c.chunk_size = 16;
  c.norm_num_groups = 6;
  return c;
}

LlamaConfig small_llama() {
  LlamaConfig c;
  c.vocab_size = 50;
  c.num_hidden_layers = 2;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 6;
  c.initializer_range = 0;
  return c;
}

std::vector<ModelConfig> configurations() {
  std::vector<ModelConfig> all{small_megalodon(), small_llama()};
  auto c = small_megalodon();
  c.num_heads = 1;
  c.norm_affine = false;
  c.swiglu = c.rescale_nffn = c.scale_emb = c.share_emb = true;
  all.push_back(c);
  auto l = small_llama();
  l.position_embedding = "none";
  l.tie_word_embeddings = true;
  l.num_key_value_heads = 4;
  all.push_back(l);
  return all;
}

at::Tensor random_tokens(int64_t B, int64_t L, uint64_t seed) {
  Random random(seed, Purpose::test, 0);
  auto tokens = at::empty({B, L}, at::kLong);
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    tokens.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(random.below(50));
  }
  return tokens;
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(Streaming, AnySplitGivesTheLogitsOfOneCall) {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; const auto& config : configurations()) {
    const auto model = make_model(config, 7);
    const auto tokens = random_tokens(3, 300, i);
    const auto whole = model->forward(tokens);
    Random random(i++, Purpose::test, 1);
    for (int trial = 0; trial < 6; ++trial) {
      auto state = model->fresh_state(3);
      std::vector<at::Tensor> pieces;
      for (int64_t position = 0; position < 300;) {
        const auto most = trial < 2   ? 3
                          : trial < 4 ? 40
                                      : 200;  // often across chunk borders of 16, from anywhere
        const auto length = std::min<int64_t>(
            1 + static_cast<int64_t>(random.below(static_cast<uint64_t>(most))), 300 - position);
        pieces.push_back(model->forward(tokens.narrow(1, position, length), &state));
        position += length;
      }
      EXPECT_LE(largest_difference(at::cat(pieces, 1), whole), 1e-4)
          << model_type(config) << " trial " << trial;
      EXPECT_TRUE(state.position.eq(300).all().item<bool>());
    }
  }
}

TEST(Streaming, ARestartedStateIsFresh) {
  const at::NoGradGuard no_grad;
  for (const auto& config : configurations()) {
    const auto model = make_model(config, 7);
    const auto tokens = random_tokens(2, 60, 5);
    auto state = model->fresh_state(2);
    model->forward(random_tokens(2, 45, 6), &state);
    model->restart(state);
    EXPECT_LE(largest_difference(model->forward(tokens, &state), model->forward(tokens)), 1e-4)
        << model_type(config);
  }
}

TEST(Streaming, NextLogitsAreThoseOfTheLastPosition) {
  const at::NoGradGuard no_grad;
  for (const auto& config : configurations()) {
    const auto model = make_model(config, 7);
    const auto tokens = random_tokens(3, 60, 5);
    const auto whole = model->forward(tokens);
    auto state = model->fresh_state(3, 40);  // too little for the baseline: it grows
    for (int64_t position = 0; const int64_t length : {1, 20, 1, 38}) {
      const auto logits = model->next_logits(tokens.narrow(1, position, length), state);
      position += length;
      EXPECT_LE(largest_difference(logits, whole.select(1, position - 1)), 1e-4) << model_type(config);
    }
    EXPECT_TRUE(state.position.eq(60).all().item<bool>());
    // Streams at different positions.
    state.assign({1}, model->fresh_state(1));
    const auto second = model->next_logits(tokens, state);
    EXPECT_LE(largest_difference(second[1], whole[1][59]), 1e-4) << model_type(config);
  }
}

TEST(Streaming, StreamsOfDifferentPositionShareABatch) {
  const at::NoGradGuard no_grad;
  for (const auto& config : configurations()) {
    const auto model = make_model(config, 7);
    const std::vector<int64_t> lengths{1, 15, 16, 37};
    auto batch = model->fresh_state(4);
    std::vector<StreamState> alone;
    for (int64_t row = 0; row < 4; ++row) {
      auto state = model->fresh_state(1);
      model->forward(random_tokens(1, lengths[static_cast<std::size_t>(row)], static_cast<uint64_t>(row)),
                     &state);
      batch.assign({row}, state);
      alone.push_back(state);
    }
    const auto next = random_tokens(4, 21, 99);
    const auto together = model->forward(next, &batch);
    for (int64_t row = 0; row < 4; ++row) {
      auto& state = alone[static_cast<std::size_t>(row)];
      const auto expected = model->forward(next.narrow(0, row, 1), &state);
      EXPECT_LE(largest_difference(together.narrow(0, row, 1), expected), 1e-4)
          << model_type(config) << " row " << row;
      EXPECT_EQ(batch.position[row].item<int64_t>(), lengths[static_cast<std::size_t>(row)] + 21);
    }
  }
}

TEST(Streaming, AStateIsSavedLoadedForkedAndDropped) {
  const at::NoGradGuard no_grad;
  const auto path = std::filesystem::temp_directory_path() / "megalodon_state_test.safetensors";
  for (const auto& config : configurations()) {
    const auto model = make_model(config, 7);
    auto state = model->fresh_state(2);
    model->forward(random_tokens(2, 45, 1), &state);
    state.save(path);
    auto loaded = StreamState::load(path), forked = state.fork();
    const auto next = random_tokens(2, 9, 2);
    const auto expected = model->forward(next, &state);
    model->forward(random_tokens(2, 30, 3), &forked);  // a fork goes its own way
    EXPECT_TRUE(at::equal(model->forward(next, &loaded), expected));
  }
  std::filesystem::remove(path);
}

TEST(Streaming, MegalodonsStateDoesNotGrow) {
  const at::NoGradGuard no_grad;
  const auto model = make_model(small_megalodon(), 7);
  auto state = model->fresh_state(1);
  const auto bytes = state.bytes();
  stream(*model, random_tokens(1, 5000, 1), state, {}, [](int64_t, const at::Tensor&) {});
  EXPECT_EQ(state.bytes(), bytes);
}

TEST(Streaming, PositionsAre64Bit) {
  const at::NoGradGuard no_grad;
  const auto model = make_model(small_megalodon(), 7);
  auto near = model->fresh_state(1), far = model->fresh_state(1);
  const int64_t distant = (int64_t{1} << 40) * 16;  // a multiple of the chunk
  far.move_to(distant);
  const auto tokens = random_tokens(1, 40, 5);
  EXPECT_LE(largest_difference(model->forward(tokens, &near), model->forward(tokens, &far)), 1e-4);
  EXPECT_EQ(far.position.item<int64_t>(), distant + 40);
}

TEST(Streaming, TruncatedStatisticsAreThoseOfTheLastSixChunks) {
  const at::NoGradGuard no_grad;
  const auto model = make_model(small_megalodon(), 7);
  const auto tokens = random_tokens(1, 144, 4);
  auto truncated = model->fresh_state(1), fresh = model->fresh_state(1);
  stream(*model, tokens, truncated, {.truncate_statistics = true}, [](int64_t, const at::Tensor&) {});
  // By hand: 8 chunks, the statistics of a fresh pass over the chunks 2 to 7, then the last chunk.
  auto state = model->fresh_state(1);
  model->hidden(tokens.narrow(1, 0, 128), &state);
  model->hidden(tokens.narrow(1, 32, 96), &fresh);
  for (auto& [name, tensor] : state.tensors) {
    if (name.find("norm") != std::string::npos) tensor = fresh.tensors.at(name);
  }
  model->hidden(tokens.narrow(1, 128, 16), &state);
  for (const auto& [name, tensor] : state.tensors) {
    EXPECT_LE(ops::testing::relative_error(truncated.tensors.at(name), tensor), 1e-5) << name;
  }
  EXPECT_EQ(truncated.tensors.at("final_norm_count").item<int64_t>(), 96 + 16);
}

TEST(Model, InitialValuesAreThoseOfTheSpec) {
  auto c = small_megalodon();
  c.model_dim = 512;
  c.norm_num_groups = 32;
  c.rescale_nffn = true;
  const auto model = make_model(c, 3);
  for (const auto& [name, value, is_matrix, rounded] : model->parameters()) {
    const auto deviation = value.numel() > 1 ? value.std().item<double>() : 0;
    const auto mean = value.mean().item<double>();
    if (name.ends_with("wz.weight") || name.ends_with("fc1.weight"))
      EXPECT_NEAR(deviation, std::sqrt(1 / (3.0 * 512)), 1e-3);
    if (name.ends_with("cema.alpha")) EXPECT_NEAR(deviation, 0.2, 0.02);
    if (name.ends_with("cema.omega")) EXPECT_NEAR(deviation, 0.25, 0.03);
    if (name.ends_with("1.nffn.alpha")) EXPECT_FLOAT_EQ(static_cast<float>(mean), 0.05f);
    if (name == "embed.weight") {
      EXPECT_LE(value.abs().max().item<double>(), 3 / std::sqrt(512.0) + 1e-6);
      EXPECT_NEAR(deviation, 0.986 / std::sqrt(512.0), 1e-3);  // truncated at three deviations
    }
    if (name.ends_with("bias") || name.ends_with("gamma") || name.ends_with("beta")) {
      if (name.find("cema") == std::string::npos) EXPECT_EQ(value.abs().max().item<double>(), 0) << name;
    }
    EXPECT_EQ(is_matrix, value.dim() == 2 && name.ends_with("weight")) << name;
  }
  const auto theta0 = model->parameters()[5].value, again = make_model(c, 3)->parameters()[5].value;
  EXPECT_TRUE(at::equal(theta0, again));
}

TEST(Model, DropoutIsAFunctionOfSeedAndStep) {
  auto c = small_megalodon();
  c.dropout = c.hidden_dropout = c.attention_dropout = 0.3;
  const auto model = make_model(c, 7);
  const at::NoGradGuard no_grad;
  const auto tokens = random_tokens(2, 40, 1);
  const auto with = [&](uint64_t seed, uint64_t step) {
    DropoutKeys keys(seed, step);
    return model->forward(tokens, nullptr, &keys);
  };
  EXPECT_TRUE(at::equal(with(1, 5), with(1, 5)));
  EXPECT_FALSE(at::equal(with(1, 5), with(1, 6)));
  EXPECT_FALSE(at::equal(with(1, 5), with(2, 5)));
  EXPECT_FALSE(at::equal(with(1, 5), model->forward(tokens)));
  EXPECT_TRUE(at::equal(model->forward(tokens), model->forward(tokens)));
}

TEST(Model, Bfloat16StaysNearFloat32) {
  const at::NoGradGuard no_grad;
  for (const auto& config : configurations()) {
    const auto model = make_model(config, 7);
    const auto tokens = random_tokens(2, 70, 1);
    const auto exact = model->forward(tokens);
    model->set_compute_type(at::kBFloat16);
    EXPECT_LE(ops::testing::relative_error(model->forward(tokens), exact), 5e-2) << model_type(config);
  }
}

TEST(Model, Float8ProductsStayNearBfloat16) {
  auto c = small_megalodon();
  c.model_dim = 64, c.z_dim = 32, c.value_dim = 128, c.ffn_hidden_dim = 96, c.norm_num_groups = 8;
  auto l = small_llama();
  l.hidden_size = 64, l.intermediate_size = 96;
  for (const auto& config : {ModelConfig(c), ModelConfig(l)}) {
    const auto model = make_model(config, 7);
    model->set_compute_type(at::kBFloat16);
    model->to(ops::testing::device());
    if (!ops::testing::device().is_cpu() && !ops::has_float8_units(model->parameters()[0].value))
      GTEST_SKIP() << "no units for float8";
    const auto tokens = random_tokens(2, 64, 1).to(ops::testing::device());
    const auto gradients = [&](bool float8) {
      model->set_float8_products(float8);
      std::vector<at::Tensor> weights, flat;
      for (const auto& parameter : model->parameters()) weights.push_back(parameter.value);
      const auto loss = model->mean_loss(tokens, tokens.roll(-1, 1));
      for (const auto& d : torch::autograd::grad({loss}, weights)) flat.push_back(d.flatten());
      return std::pair(loss.item<double>(), at::cat(flat));
    };
    const auto [loss, exact] = gradients(false);
    const auto [loss8, near] = gradients(true);
    EXPECT_NEAR(loss8, loss, 0.02 * loss) << model_type(config);
    const auto error = ops::testing::relative_error(near, exact);
    EXPECT_LE(error, 0.15) << model_type(config);
    EXPECT_GE(error, 0.01) << model_type(config);  // it is float8
  }
}

TEST(Model, GradientsAreTheSameWithEverythingKept) {
  const auto config = configurations()[0];
  const auto model = make_model(config, 7);
  model->to(ops::testing::device());
  const auto tokens = random_tokens(2, 70, 1).to(ops::testing::device());
  const auto gradients = [&](bool recomputes) {
    model->set_recomputation(recomputes);
    std::vector<at::Tensor> weights, flat;
    for (const auto& parameter : model->parameters()) weights.push_back(parameter.value);
    for (const auto& d : torch::autograd::grad({model->mean_loss(tokens, tokens)}, weights))
      flat.push_back(d.flatten());
    return at::cat(flat);
  };
  EXPECT_TRUE(at::equal(gradients(true), gradients(false)));
}

// Of each model of a stack too; every fifth target is ignored.
TEST(Model, MeanLossIsThatOfTheLogits) {
  auto models = configurations();
  models.push_back(small_llama());
  for (std::size_t i = 0; i < models.size(); ++i) {
    const bool stacked = i + 1 == models.size();
    const auto model =
        make_stack(models[i], stacked ? std::vector<uint64_t>{1, 2} : std::vector<uint64_t>{1});
    const auto tokens = random_tokens(4, 20, 3);
    const auto targets = random_tokens(4, 20, 4).masked_fill(tokens.remainder(5).eq(0), ops::kIgnoredTarget);
    const auto nll = ops::cross_entropy(model->forward(tokens).flatten(0, 1), targets.flatten());
    const auto want = nll.view({model->stack(), -1}).sum(1) /
                      targets.ne(ops::kIgnoredTarget).view({model->stack(), -1}).sum(1);
    const auto got = model->mean_loss(tokens, targets);
    EXPECT_EQ(got.dim(), stacked ? 1 : 0);
    EXPECT_LE(largest_difference(got.view(-1), want), 1e-6) << i;
    std::vector<at::Tensor> weights;
    for (const auto& parameter : model->parameters()) weights.push_back(parameter.value);
    const auto d_want = torch::autograd::grad({want.sum()}, weights),
               d_got = torch::autograd::grad({got.sum()}, weights);
    for (std::size_t w = 0; w < weights.size(); ++w)
      EXPECT_LE(ops::testing::relative_error(d_got[w], d_want[w]), 1e-5) << model->parameters()[w].name;
  }
}

// Products of weights that lie together, with the copies of these, against products one by one.
TEST(Model, HasTheSameGradientsWithRoundedWeights) {
  std::vector<ModelConfig> configs{small_megalodon()};
  for (const int64_t d : {16, 32}) {
    auto c = small_llama();
    c.position_embedding = "none";
    c.head_dim = d;
    configs.push_back(c);
    c.num_key_value_heads = 4;
    configs.push_back(c);
  }
  std::get<MegalodonConfig>(configs[0]).swiglu = true;
  const auto device = ops::testing::device();
  const auto tokens = random_tokens(2, 20, 3).to(device), targets = random_tokens(2, 20, 4).to(device);
  const ops::Sequences sequences{at::tensor({0, 17, 20, 33, 40}, at::kInt).to(device), 17};
  for (const auto& config : configs) {
    const auto model = make_model(config, 1);
    model->to(device);
    model->set_compute_type(at::kBFloat16);
    std::vector<at::Tensor> weights;
    for (const auto& parameter : model->parameters()) weights.push_back(parameter.value);
    for (const bool packed : {false, true}) {
      if (packed && !model->packs()) continue;
      const auto gradients = [&] {
        const auto loss =
            packed ? model->mean_loss(tokens, targets, sequences) : model->mean_loss(tokens, targets);
        return torch::autograd::grad({loss}, weights);
      };
      const auto want = gradients();
      model->keep_rounded();
      const auto got = gradients();
      for (std::size_t i = 0; i < got.size(); ++i)
        EXPECT_LE(ops::testing::relative_error(got[i], want[i]), 3e-2) << model->parameters()[i].name;
      const at::NoGradGuard no_grad;
      for (auto& weight : weights) weight.mul_(1);  // the copies are out of date
    }
  }
}

// Values and gradients of several layers over one x are those of torch's linear layers, one by one.
TEST(Projection, AgreesWithLinearLayers) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().clone().set_requires_grad(true); };
  const auto x = ops::testing::random({2, 3, 5}, at::kDouble), w1 = ops::testing::random({4, 5}, at::kDouble),
             w2 = ops::testing::random({6, 5}, at::kDouble), b2 = ops::testing::random({6}, at::kDouble),
             added = ops::testing::random({2, 3, 6}, at::kDouble);
  const auto d1 = ops::testing::random({2, 3, 4}, at::kDouble),
             d2 = ops::testing::random({2, 3, 6}, at::kDouble);
  const std::vector<at::Tensor> got{leaf(x), leaf(w1), leaf(w2), leaf(b2), leaf(added)},
      want{leaf(x), leaf(w1), leaf(w2), leaf(b2), leaf(added)};
  const auto y = project(got[0], {{got[1]}, {got[2], got[3], got[4]}});
  (y[0] * d1).sum().add((y[1] * d2).sum()).backward();
  const auto y1 = at::linear(want[0], want[1]), y2 = at::linear(want[0], want[2], want[3]) + want[4];
  (y1 * d1).sum().add((y2 * d2).sum()).backward();
  EXPECT_LE(largest_difference(y[0], y1), 1e-12);
  EXPECT_LE(largest_difference(y[1], y2), 1e-12);
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT_LE(largest_difference(got[i].grad(), want[i].grad()), 1e-12) << i;

  const auto unused = project(leaf(x), {{got[1]}, {got[2], got[3]}});
  unused[1].sum().backward();  // of a layer that nothing depends on there is no gradient
}

TEST(Projection, SumsTheGradientOfWhatItPasses) {
  for (const bool shared : {false, true}) {  // whether somebody else holds the gradient that came
    const auto leaf = [](const at::Tensor& x) { return x.detach().clone().set_requires_grad(true); };
    const auto x = ops::testing::random({2, 3, 5}), w = ops::testing::random({4, 5}),
               d1 = ops::testing::random({2, 3, 4}), d2 = ops::testing::random({2, 3, 5});
    const auto got = leaf(x), want = leaf(x);
    const auto of_got = project_and_pass(got * 1, {{w}});
    EXPECT_TRUE(at::equal(of_got[1], x));
    const auto kept = d2.clone();
    const auto other = shared ? (of_got[1] * kept).sum() : (of_got[1].square() * kept).sum();
    at::Tensor seen;
    if (shared) of_got[1].register_hook([&](const at::Tensor& d) { seen = d; });
    ((of_got[0] * d1).sum() + other).backward();
    const auto wanted = shared ? (want * d2).sum() : (want.square() * d2).sum();
    ((at::linear(want, w) * d1).sum() + wanted).backward();
    EXPECT_LE(ops::testing::relative_error(got.grad(), want.grad()), 1e-6);
    EXPECT_TRUE(at::equal(kept, d2));
    if (shared) EXPECT_TRUE(at::equal(seen, d2));
  }
}

TEST(Projection, KeepsTheWeightsType) {
  const auto x = ops::testing::random({3, 5}).to(at::kBFloat16).set_requires_grad(true);
  const auto w =
      ops::testing::random({2, 4, 5}).set_requires_grad(true);  // two models, of which x has none to share
  EXPECT_THROW(project(x, w), c10::Error);
  const auto even = ops::testing::random({6, 5}).to(at::kBFloat16).set_requires_grad(true);
  const auto y = project(even, w);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  y.sum().backward();
  EXPECT_EQ(w.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(even.grad().scalar_type(), at::kBFloat16);
}

// With everything in float8, and where a size does not suit not at all.
TEST(Projection, InFloat8IsTheProductsOfFloat8Numbers) {
  using ops::Float8ProductOptions, ops::to_float8;
  constexpr auto narrow = at::kFloat8_e4m3fn;
  ParameterMaker make({1}, true);
  const auto w = make.weight("w", {32, 48}, 0.1), odd = make.weight("odd", {7, 48}, 0.1);
  const auto parameters = make.take();
  for (const auto& p : parameters) p.rounded->in_float8 = true;
  const auto x = ops::testing::random({2, 8, 48}).cpu().set_requires_grad(true);
  const auto y = project(x, {{w}, {odd}});
  EXPECT_TRUE(at::equal(y[1], at::linear(x, odd)));
  const auto rows = to_float8(x.detach().flatten(0, 1), narrow, true, true),
             weight = to_float8(w.value().detach(), narrow, true, true);
  const Float8ProductOptions options{.type = at::kFloat};
  EXPECT_TRUE(at::equal(y[0].flatten(0, 1),
                        ops::float8_product(rows.rows, rows.scale, weight.rows, weight.scale, options)));
  const auto dy = ops::testing::random({2, 8, 32}).cpu();
  y[0].backward(dy);
  const auto d = to_float8(dy.flatten(0, 1), at::kFloat8_e5m2, true, true);
  EXPECT_TRUE(at::equal(x.grad().flatten(0, 1),
                        ops::float8_product(d.rows, d.scale, weight.columns, weight.scale, options)));
  EXPECT_TRUE(at::equal(w.value().grad(),
                        ops::float8_product(d.columns, d.scale, rows.columns, rows.scale, options)));
}

// Weights that lie together give results that do, on a GPU, and gradients whether these do or not.
TEST(Projection, TakesWeightsThatLieTogetherAtOnce) {
  const auto device = ops::testing::device();
  ParameterMaker make({1}, true);
  const std::vector<Weight> weights{make.weight("a", {24, 16}, 1), make.weight("b", {8, 16}, 1),
                                    make.weight("c", {16, 16}, 1)};
  Weight::lay_together({weights[0], weights[1], weights[2]});
  auto parameters = make.take();
  for (auto& p : parameters) p.value.set_data(p.value.to(device));
  const auto leaf = ops::testing::random({2, 5, 16}, at::kBFloat16);
  const auto dy = ops::testing::random({2, 5, 48}, at::kBFloat16).split_with_sizes({24, 8, 16}, -1);
  const auto gradients = [&](const std::vector<at::Tensor>& d) {
    const auto x = leaf.detach().clone().set_requires_grad(true);
    const auto y = project(x, {{weights[0]}, {weights[1]}, {weights[2]}});
    std::vector<at::Tensor> all{x};
    for (const auto& p : parameters) all.push_back(p.value);
    auto results = torch::autograd::grad(y, all, d);
    for (const auto& y_i : y) results.push_back(y_i.detach());
    return results;
  };
  const std::vector<at::Tensor> apart{dy[0].clone(), dy[1].clone(), dy[2].clone()};
  const auto want = gradients(apart);
  EXPECT_FALSE(ops::joined({want[4], want[5], want[6]}, -1).defined());
  for (const auto& p : parameters) p.rounded->update(p.value, at::kBFloat16);
  for (const auto& d : {dy, apart}) {
    const auto got = gradients(d);
    EXPECT_EQ(ops::joined({got[4], got[5], got[6]}, -1).defined(), device.is_cuda());
    for (std::size_t i = 0; i < got.size(); ++i)
      EXPECT_LE(ops::testing::relative_error(got[i], want[i]), 1e-2) << i;
  }
  const at::NoGradGuard no_grad;
  const auto answers = project(leaf, {{weights[0]}, {weights[1]}, {weights[2]}});
  EXPECT_EQ(ops::joined(answers, -1).defined(), device.is_cuda());
  for (std::size_t i = 0; i < answers.size(); ++i)
    EXPECT_LE(ops::testing::relative_error(answers[i], want[4 + i]), 1e-2) << i;
}

// Drops and sums as the operators one after the other, bit for bit where nothing is added.
TEST(Projection, OfSwigluIsItsPartsInOrder) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().clone().set_requires_grad(true); };
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const bool gated : {true, false}) {
      struct Case {
        bool added, kept;
        double p;
      };
      for (const auto& c :
           {Case{true, true, 0.25}, {true, false, 0.25}, {false, true, 0}, {false, false, 0.25}}) {
        const auto of = [&](const std::vector<at::Tensor>& in, bool fused) {
          const Drop drop(c.p, int64_t{7});
          const auto b = gated ? std::optional(in[1]) : std::nullopt;
          const auto sum = in[3] * 1;
          if (fused) {
            return project_swiglu(in[0], b, in[2], drop,
                                  {.added = c.added ? std::optional(sum) : std::nullopt,
                                   .hidden = c.kept ? ops::swiglu(in[0], b).detach() : at::Tensor(),
                                   .keeps_hidden = c.kept});
          }
          const auto y = project(drop(ops::swiglu(in[0], b)), in[2]);
          return c.added ? sum + y : y;
        };
        const std::vector<at::Tensor> in{
            ops::testing::random({2, 5, 24}, type), ops::testing::random({2, 5, 24}, type),
            ops::testing::random({16, 24}), ops::testing::random({2, 5, 16}, type)};
        std::vector<at::Tensor> got, want;
        for (const auto& x : in) {
          got.push_back(leaf(x));
          want.push_back(leaf(x));
        }
        const auto y = of(got, true), y_want = of(want, false), dy = ops::testing::random({2, 5, 16}, type);
        const double rounding = !c.added ? 0 : type == at::kFloat ? 1e-6 : 1e-2;
        EXPECT_LE(ops::testing::relative_error(y.detach(), y_want.detach()), rounding);
        y.backward(dy);
        y_want.backward(dy);
        for (std::size_t i = 0; i < in.size(); ++i) {
          ASSERT_EQ(got[i].grad().defined(), want[i].grad().defined());
          if (want[i].grad().defined()) EXPECT_TRUE(at::equal(got[i].grad(), want[i].grad())) << i;
        }
        const at::NoGradGuard no_grad;
        EXPECT_TRUE(at::equal(of(got, true), y));
      }
    }
  }
}

// Sizes that a GPU's kernels of products with SwiGLU take; on a CPU the parts.
TEST(Projection, ForSwigluAgreesWithItsParts) {
  const auto device = ops::testing::device();
  ParameterMaker make({1}, true);
  const auto gate = make.weight("gate", {128, 64}, 0.1), up = make.weight("up", {128, 64}, 0.1),
             down = make.weight("down", {64, 128}, 0.1);
  Weight::lay_together({gate, up});
  auto parameters = make.take();
  for (auto& p : parameters) p.value.set_data(p.value.to(device));
  for (const auto& p : parameters) p.rounded->update(p.value, at::kBFloat16);
  const auto leaf = ops::testing::random({3, 11, 64}, at::kBFloat16),
             dy = ops::testing::random({3, 11, 64}, at::kBFloat16);
  const auto results = [&](auto&& f) {
    const auto x = leaf.detach().clone().set_requires_grad(true);
    const auto y = f(x);
    std::vector<at::Tensor> all{x};
    for (const auto& p : parameters) all.push_back(p.value);
    auto found = torch::autograd::grad({y}, all, {dy});
    found.push_back(y.detach());
    return found;
  };
  const auto want = results(
      [&](const at::Tensor& x) { return project(ops::swiglu(project(x, gate), project(x, up)), down); });
  for (const bool keeps : {true, false}) {
    const auto got = results([&](const at::Tensor& x) {
      const auto [a, b, hidden] = project_for_swiglu(x, gate, up);
      EXPECT_EQ(hidden.defined(), device.is_cuda());
      EXPECT_FALSE(hidden.defined() && hidden.requires_grad());
      return project_swiglu(a, b, down, Drop(0, nullptr), {.hidden = hidden, .keeps_hidden = keeps});
    });
    for (std::size_t i = 0; i < want.size(); ++i)
      EXPECT_LE(ops::testing::relative_error(got[i], want[i]), 1.5e-2) << i;
  }
  const auto x = leaf.detach().clone().set_requires_grad(true);
  project(project_for_swiglu(x, gate, up).b, down)
      .backward(dy);  // nothing is made of the other layer's result
  EXPECT_TRUE(x.grad().defined() && up.value().grad().defined());
}

// Sizes that a GPU's kernels of products with RMS norm take; on a CPU the parts. A product, a norm, SwiGLU's
// projections, its product, a norm and projections; and its product again and a norm alone.
TEST(Projection, WithNormsAgreesWithItsParts) {
  const auto device = ops::testing::device();
  ParameterMaker make({1}, true);
  const auto out = make.weight("out", {384, 192}, 0.1), gate = make.weight("gate", {128, 384}, 0.1),
             up = make.weight("up", {128, 384}, 0.1), down = make.weight("down", {384, 128}, 0.1),
             k = make.weight("k", {64, 384}, 0.1), q = make.weight("q", {128, 384}, 0.1);
  Weight::lay_together({gate, up});
  Weight::lay_together({k, q});
  auto parameters = make.take();
  for (auto& p : parameters) p.value.set_data(p.value.to(device));
  for (const auto& p : parameters) p.rounded->update(p.value, at::kBFloat16);
  const std::vector<at::Tensor> leaves{ops::testing::random({3, 50, 384}),
                                       ops::testing::random({3, 50, 192}, at::kBFloat16),
                                       ops::testing::random({384}), ops::testing::random({384})};
  const std::vector<at::Tensor> d{
      ops::testing::random({3, 50, 384}), ops::testing::random({3, 50, 64}, at::kBFloat16),
      ops::testing::random({3, 50, 128}, at::kBFloat16), ops::testing::random({3, 50, 384}, at::kBFloat16)};
  const auto input = [](const at::Tensor& x, const Addend& added, const at::Tensor& factor) {
    return NormInput{x, added, factor, 1e-5, at::kBFloat16};
  };
  const auto plain = [&](const std::vector<at::Tensor>& in) -> std::vector<at::Tensor> {
    const auto [h, v] = ops::add_rms_norm(in[0], project(in[1], out), in[2], 1e-5, at::kBFloat16);
    const auto hidden = ops::swiglu(project(v, gate), project(v, up));
    const auto [x, u] = ops::add_rms_norm(h, project(hidden, down), in[3], 1e-5, at::kBFloat16);
    const auto [y, w] = ops::add_rms_norm(x, project(hidden, down), in[2], 1e-5, at::kBFloat16);
    return {y, project(u, k), project(u, q), w};
  };
  const auto fused = [&](const std::vector<at::Tensor>& in) -> std::vector<at::Tensor> {
    const auto added = project_for_norm(in[1], out, {{gate}, {up}});
    const auto [h, inputs] = norm_and_project_for_swiglu(input(in[0], added, in[2]), gate, up);
    SwigluOptions options{.hidden = inputs.hidden, .keeps_hidden = inputs.hidden.defined()};
    const auto product = [&](std::initializer_list<Linear> behind) -> Addend {
      if (inputs.hidden.defined()) options.product = leave_to_norm(inputs.hidden, down, behind);
      return {project_swiglu(inputs.a, inputs.b, down, Drop(0, nullptr), options), options.product};
    };
    const auto [x, parts] = norm_and_project(input(h, product({{k}, {q}}), in[3]), {{k}, {q}});
    const auto [y, w] = norm(input(x, product({}), in[2]));
    return {y, parts[0], parts[1], w};
  };
  for (const std::size_t first : {0, 1}) {  // without the stream's gradient
    const auto results = [&](auto&& f) {
      std::vector<at::Tensor> all;
      for (const auto& x : leaves) all.push_back(x.detach().clone().set_requires_grad(true));
      const auto y = f(all);
      for (const auto& p : parameters) all.push_back(p.value);
      const auto from = [&](const std::vector<at::Tensor>& x) {
        return std::vector<at::Tensor>(x.begin() + static_cast<std::ptrdiff_t>(first), x.end());
      };
      auto found = torch::autograd::grad(from(y), all, from(d));
      for (const auto& y_i : y) found.push_back(y_i.detach());
      return found;
    };
    const auto got = results(fused), want = results(plain);
    for (std::size_t i = 0; i < want.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), want[i].scalar_type()) << i;
      EXPECT_LE(ops::testing::relative_error(got[i], want[i]), 1.5e-2) << i;
    }
  }
  const at::NoGradGuard no_grad;
  EXPECT_LE(ops::testing::relative_error(fused(leaves)[2], plain(leaves)[2]), 1.5e-2);
}

TEST(Projection, OfATablesRowsIsThatOfItsTokens) {
  const auto device = ops::testing::device();
  ParameterMaker make({1}, true);
  const auto k = make.weight("k", {16, 32}, 0.2), q = make.weight("q", {24, 32}, 0.2);
  Weight::lay_together({k, q});
  auto parameters = make.take();
  for (auto& p : parameters) p.value.set_data(p.value.to(device));
  for (const auto& p : parameters) p.rounded->update(p.value, at::kBFloat16);
  const auto tokens = random_tokens(4, 60, 1).remainder(26).to(device);
  const auto upstream = ops::testing::random({4, 60, 40}, at::kBFloat16);
  const auto d = upstream.split_with_sizes({16, 24}, -1);
  const auto d_sum = ops::testing::random({4, 60, 32});
  const auto table = ops::testing::random({26, 32}).set_requires_grad(true),
             factor = ops::testing::random({32}).set_requires_grad(true);
  const auto results = [&](bool with_lookup) {
    NormInput input{embed(table, tokens, at::kFloat), {}, factor, 1e-5, at::kBFloat16};
    if (with_lookup) input.lookup = {table, tokens};
    const auto [sum, parts] = norm_and_project(input, {{k}, {q}});
    auto found = torch::autograd::grad({sum, parts[0], parts[1]}, {table, factor, k, q}, {d_sum, d[0], d[1]});
    for (const auto& y : {sum, parts[0], parts[1]}) found.push_back(y.detach());
    return found;
  };
  const auto got = results(true), want = results(false), again = results(true);
  for (std::size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(got[i].scalar_type(), want[i].scalar_type()) << i;
    EXPECT_LE(ops::testing::relative_error(got[i], want[i]), 1.5e-2) << i;
    EXPECT_TRUE(at::equal(got[i], again[i])) << i;
  }
}

TEST(Stack, IsItsModelsSideBySide) {
  auto tied = small_llama();
  tied.position_embedding = "none";
  tied.tie_word_embeddings = true;
  for (const auto& config : {small_llama(), tied}) {
    const std::vector<uint64_t> seeds{3, 4, 5};
    const auto stack = make_stack(config, seeds);
    ASSERT_EQ(stack->stack(), 3);
    constexpr int64_t B = 2, L = 7;
    const auto tokens = random_tokens(3 * B, L, 1);
    const auto logits = stack->forward(tokens);
    logits.square().mean().backward();
    {
      const at::NoGradGuard no_grad;
      auto state = stack->fresh_state(3 * B);
      const auto streamed = at::cat(
          {stack->forward(tokens.narrow(1, 0, 4), &state), stack->forward(tokens.narrow(1, 4, 3), &state)},
          1);
      EXPECT_LE(largest_difference(streamed, logits), 1e-4);
    }
    for (int64_t k = 0; k < 3; ++k) {
      const auto alone = make_model(config, seeds[static_cast<std::size_t>(k)]);
      const auto expected = alone->forward(tokens.narrow(0, k * B, B));
      EXPECT_LE(ops::testing::relative_error(logits.narrow(0, k * B, B).detach(), expected.detach()), 1e-6);
      (expected.square().mean() / 3).backward();
      const auto view = member(*stack, k);
      for (std::size_t i = 0; i < alone->parameters().size(); ++i) {
        const auto &stacked = stack->parameters()[i], &own = alone->parameters()[i];
        EXPECT_EQ(stacked.is_matrix, own.is_matrix);
        EXPECT_TRUE(at::equal(view->parameters()[i].value, own.value)) << own.name;
        EXPECT_LE(ops::testing::relative_error(stacked.value.grad()[k], own.value.grad()), 1e-5) << own.name;
      }
    }
  }
}

TEST(Stack, SharesItsWeightsWithItsMembers) {
  const auto stack = make_stack(small_llama(), {1, 2});
  const auto second = member(*stack, 1);
  {
    const at::NoGradGuard no_grad;
    auto value = second->parameters()[0].value;
    value.fill_(0.5);
  }
  EXPECT_TRUE(stack->parameters()[0].value[1].eq(0.5).all().item<bool>());
  EXPECT_FALSE(stack->parameters()[0].value[0].eq(0.5).any().item<bool>());
}

// The copies are used, and no longer once a weight was written to: through the model or a member of its
// stack.
TEST(Stack, RoundedWeightsAreNeverOutOfDate) {
  const at::NoGradGuard no_grad;
  const auto stack = make_stack(small_llama(), {1, 2}), other = make_stack(small_llama(), {1, 2});
  for (const auto& m : {stack.get(), other.get()}) m->set_compute_type(at::kBFloat16);
  const auto tokens = random_tokens(4, 7, 1);
  const auto copies = [&] {
    int64_t current = 0;
    for (const auto& p : stack->parameters())
      current += p.rounded && p.rounded->of(p.value, at::kBFloat16).defined() ? 1 : 0;
    return current;
  };
  EXPECT_EQ(copies(), 0);
  stack->keep_rounded();
  const auto all = copies();
  EXPECT_EQ(all, small_llama().num_hidden_layers * 7);
  EXPECT_TRUE(at::equal(stack->forward(tokens), other->forward(tokens)));
  for (std::size_t i = 0; i < stack->parameters().size(); ++i) {
    if (!stack->parameters()[i].rounded) continue;
    at::Tensor(stack->parameters()[i].value).mul_(1.5);
    const auto second = member(*stack, 1);
    at::Tensor(second->parameters()[i].value).add_(0.25);
    auto value = other->parameters()[i].value;
    value.copy_(stack->parameters()[i].value);
  }
  EXPECT_EQ(copies(), 0);
  EXPECT_TRUE(at::equal(stack->forward(tokens), other->forward(tokens)));
  stack->keep_rounded();
  EXPECT_EQ(copies(), all);
  const auto first = stack->parameters()[1].rounded ? std::size_t{1} : std::size_t{2};
  member(*stack, 0)->parameters()[first].value.zero_();
  EXPECT_EQ(copies(), all - 1);
  stack->set_compute_type(at::kFloat);
  other->set_compute_type(at::kFloat);
  other->parameters()[first].value[0].zero_();
  EXPECT_TRUE(at::equal(stack->forward(tokens), other->forward(tokens)));
}

TEST(Stack, IsTheBaselinesAlone) {
  const auto message = testing::request_error([] { make_stack(small_megalodon(), {1, 2}); });
  EXPECT_TRUE(testing::contains(message, "type megalodon"));
  EXPECT_EQ(make_stack(small_megalodon(), {1})->stack(), 1);
}

}  // namespace
}  // namespace megalodon::model
