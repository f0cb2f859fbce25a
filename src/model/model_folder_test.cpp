#include "model/model_folder.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/file.h"
#include "model/tensor_file.h"

namespace megalodon::model {
namespace {
namespace fs = std::filesystem;

class ModelFolder : public ::testing::Test {
 protected:
  fs::path folder_ = fs::temp_directory_path() / ("megalodon_model_folder_" + std::to_string(::getpid()));
  void TearDown() override { fs::remove_all(folder_); }

  static LlamaConfig config() {
    LlamaConfig c;
    c.vocab_size = 20;
    c.num_hidden_layers = 1;
    c.hidden_size = 8;
    c.intermediate_size = 12;
    c.num_attention_heads = c.num_key_value_heads = 2;
    c.head_dim = 4;
    return c;
  }
  std::string load_error() {
    try {
      load_model(folder_);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
};

TEST_F(ModelFolder, RoundTripsWholeAndInShards) {
  const at::NoGradGuard no_grad;
  const auto tokens = at::arange(12).view({1, 12});
  const auto model = make_model(config(), 5);
  for (const std::size_t shard_bytes : {std::size_t{1} << 30, std::size_t{600}}) {
    fs::remove_all(folder_);
    save_model(*model, folder_, shard_bytes);
    EXPECT_EQ(fs::exists(folder_ / "model.safetensors.index.json"), shard_bytes == 600);
    EXPECT_TRUE(at::equal(load_model(folder_)->forward(tokens), model->forward(tokens)));
  }
}

// Hugging Face keeps the two of a rotary pair half a head apart: its row 1 is our row 2.
TEST_F(ModelFolder, RotaryRowsLieInFilesAsHuggingFaceHasThem) {
  const auto model = make_model(config(), 5);
  save_model(*model, folder_);
  const auto stored =
      read_tensor(SafetensorsFile(folder_ / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight");
  for (const auto& [name, value, is_matrix, rounded] : model->parameters()) {
    if (!name.ends_with("q_proj.weight")) continue;
    EXPECT_TRUE(at::equal(stored[1], value[2]));
    EXPECT_TRUE(at::equal(stored[2], value[1]));
  }
}

TEST_F(ModelFolder, NamesWhatDoesNotFit) {
  EXPECT_NE(load_error().find("no such model directory"), std::string::npos);
  const auto model = make_model(config(), 5);
  save_model(*model, folder_);
  auto other = config();
  other.hidden_size = 16;
  write_file_atomically(folder_ / "config.json", to_json(other).dump());
  EXPECT_NE(load_error().find("has shape"), std::string::npos);
  other = config();
  other.num_hidden_layers = 2;
  write_file_atomically(folder_ / "config.json", to_json(other).dump());
  EXPECT_NE(load_error().find("no tensor 'model.layers.1"), std::string::npos);
  write_file_atomically(folder_ / "config.json", "{\"model_type\": \"gpt\"}");
  EXPECT_NE(load_error().find("unknown model_type 'gpt'"), std::string::npos);
  write_file_atomically(folder_ / "config.json", "{");
  EXPECT_NE(load_error().find("config.json"), std::string::npos);
  fs::remove(folder_ / "config.json");
  EXPECT_NE(load_error().find("config.json"), std::string::npos);
}

}  // namespace
}  // namespace megalodon::model
