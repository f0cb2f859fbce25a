#include "generate/session.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace megalodon::generate {
namespace {
namespace fs = std::filesystem;

std::unique_ptr<model::LanguageModel> tiny_model(int64_t layers = 2) {
  model::MegalodonConfig c;
  c.vocab_size = 30;
  c.num_layers = layers;
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

std::vector<int64_t> draw(Session& session, int n) {
  std::vector<int64_t> tokens;
  tokens.reserve(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) tokens.push_back(session.draw({.seed = 9}));
  return tokens;
}

class SessionTest : public ::testing::Test {
 protected:
  fs::path path_ =
      fs::temp_directory_path() / ("megalodon_session_" + std::to_string(::getpid()) + ".safetensors");
  std::vector<int32_t> prompt_ = std::vector<int32_t>(21);
  void SetUp() override { std::iota(prompt_.begin(), prompt_.end(), 0); }
  void TearDown() override { fs::remove(path_); }
};

TEST_F(SessionTest, GoesOnFromAFileAsIfItHadNotStopped) {
  const auto model = tiny_model();
  Session whole(*model), first(*model);
  whole.read(prompt_);
  first.read(prompt_);
  auto expected = draw(whole, 30), got = draw(first, 12);
  first.save(path_);
  Session second(*model, path_);
  for (const auto token : draw(second, 18)) got.push_back(token);
  EXPECT_EQ(got, expected);
  EXPECT_EQ(second.position(), 51);
}

TEST_F(SessionTest, ReadsInAnyPieces) {
  const auto model = tiny_model();
  Session whole(*model), pieces(*model);
  whole.read(prompt_);
  for (const auto token : prompt_) pieces.read({&token, 1});
  EXPECT_EQ(draw(whole, 10), draw(pieces, 10));
}

TEST_F(SessionTest, RefusesWhatItCannotContinue) {
  const auto model = tiny_model(), other = tiny_model(3);
  Session session(*model);
  EXPECT_THROW(session.draw({}), Error);
  session.read(prompt_);
  session.save(path_);
  EXPECT_THROW(Session(*other, path_), Error);
  fs::resize_file(path_, fs::file_size(path_) / 2);
  EXPECT_THROW(Session(*model, path_), Error);
  EXPECT_THROW(Session(*model, path_.string() + ".missing"), Error);
}

}  // namespace
}  // namespace megalodon::generate
