#include "model/config.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "model/language_model.h"

namespace megalodon::model {
namespace {

ModelConfig read(const std::string& text, int64_t vocabulary = 256) {
  auto config = Config::from_text(text, "test.toml");
  auto result = read_model_config(config, vocabulary);
  config.finish();
  return result;
}

const char kSmall[] =
    "[model]\nnum_layers=2\nmodel_dim=16\nnum_heads=2\nz_dim=8\nvalue_dim=16\nffn_hidden_dim=16\nchunk_size="
    "8\n"
    "norm_num_groups=4\n";

std::string message_of(const std::string& text) {
  try {
    read(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), Error::Kind::request);
    return error.what();
  }
  return "no error";
}

TEST(ModelConfig, PresetsHaveThePapersSizes) {
  // All layers are alike: two models of one and two of them tell the size, 28 GB of weights need not be had.
  const auto parameters = [](const std::string& preset) {
    const auto of_layers = [&](int64_t layers) {
      const auto text = "[model]\npreset = \"" + preset + "\"\nnum_layers = " + std::to_string(layers);
      return make_model(read(text, 32000), 0, false)->parameter_count();
    };
    const auto layers =
        std::get<MegalodonConfig>(read("[model]\npreset = \"" + preset + "\"", 32000)).num_layers;
    return of_layers(1) + (layers - 1) * (of_layers(2) - of_layers(1));
  };
  EXPECT_NEAR(static_cast<double>(parameters("200M")) / 1e9, 0.221, 5e-4);
  EXPECT_NEAR(static_cast<double>(parameters("1.3B")) / 1e9, 1.343, 5e-4);
  EXPECT_NEAR(static_cast<double>(parameters("1.3B-pg19")) / 1e9, 1.328, 5e-4);
  EXPECT_NEAR(static_cast<double>(parameters("7B")) / 1e9, 7.117, 5e-4);
  EXPECT_NEAR(static_cast<double>(parameters("7B-swiglu")) / 1e9, 7.386, 5e-4);
}

TEST(ModelConfig, TheBaselineThatTeachesItselfHasItsSize) {  // arXiv 2502.01612
  const auto config = read(
      "[model]\ntype=\"llama\"\nnum_hidden_layers=6\nhidden_size=384\nintermediate_size=1536\n"
      "num_attention_heads=6\nposition_embedding=\"none\"\n",
      102);
  EXPECT_EQ(make_model(config, 0, false)->parameter_count(), 14239104);
}

TEST(ModelConfig, JsonRoundTrips) {
  const auto config = read(std::string(kSmall) + "swiglu=true\nrope_base=1e5\n");
  const auto again = model::from_json(to_json(config), "config.json");
  EXPECT_EQ(to_json(again), to_json(config));
  EXPECT_EQ(fingerprint(again), fingerprint(config));
}

TEST(ModelConfig, ReadsAHuggingFaceLlama) {
  const auto json = parse_json(
      R"({"model_type":"llama","vocab_size":100,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,
          "num_attention_heads":4,"rms_norm_eps":1e-6,"hidden_act":"silu","max_position_embeddings":2048})",
      "config.json");
  const auto c = std::get<LlamaConfig>(model::from_json(json, "config.json"));
  EXPECT_EQ(c.num_key_value_heads, 4);
  EXPECT_EQ(c.head_dim, 8);
}

TEST(ModelConfig, RefusesLlamasThatItIsNot) {
  auto json = parse_json(
      R"({"model_type":"llama","vocab_size":100,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,
          "num_attention_heads":4,"rope_parameters":{"rope_theta":5e5,"rope_type":"default"}})",
      "config.json");
  EXPECT_EQ(std::get<LlamaConfig>(model::from_json(json, "config.json")).rope_theta, 5e5);
  json["rope_parameters"]["rope_type"] = "llama3";
  EXPECT_THROW(model::from_json(json, "config.json"), Error);
  json.erase("rope_parameters");
  json["attention_bias"] = true;
  EXPECT_THROW(model::from_json(json, "config.json"), Error);
}

TEST(ModelConfig, NamesWhatCannotBe) {
  EXPECT_NE(message_of(std::string(kSmall) + "norm_num_groups=5\n"), "no error");  // a key twice
  const auto with = [](const std::string& from, const std::string& to) {
    std::string text = kSmall;
    return message_of(text.replace(text.find(from), from.size(), to));
  };
  EXPECT_NE(with("norm_num_groups=4", "norm_num_groups=5").find("model_dim"), std::string::npos);
  EXPECT_NE(with("norm_num_groups=4", "norm_num_groups=16").find("no variance"), std::string::npos);
  EXPECT_NE(with("num_heads=2", "num_heads=3").find("not divisible by num_heads"), std::string::npos);
  EXPECT_NE(with("chunk_size=8", "chunk_size=0").find("model.chunk_size"), std::string::npos);
  EXPECT_NE(with("z_dim=8", "z_dim=6").find("even"), std::string::npos);
  EXPECT_NE(with("chunk_size=8", "chunk_sise=8").find("chunk_size"), std::string::npos);
  EXPECT_NE(message_of(std::string(kSmall) + "vocab_size=100\n").find("tokenizer's vocabulary"),
            std::string::npos);
}

}  // namespace
}  // namespace megalodon::model
