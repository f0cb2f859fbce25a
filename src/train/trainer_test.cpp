#include "train/trainer.h"

#include <gtest/gtest.h>

#include "base/testing.h"
#include "train/corpora.h"

namespace megalodon::train {
namespace {

struct Losses : Listener {
  std::vector<double> steps, validations;
  void on_start(const Json&) override {}
  void on_step(const StepMetrics& m) override { steps.push_back(m.loss); }
  void on_validation(const ValidationMetrics& m) override { validations.push_back(m.loss); }
};

class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest() {
    std::string text;
    for (int i = 0; i < 200; ++i)
      text += "one shark, two sharks, " + std::to_string(i * i % 17) + " sharks\n";
    testing::write_text(folder_ / "train.txt", text);
    testing::write_text(folder_ / "validation.txt", text.substr(0, 900));
  }
  Losses train(const std::string& settings) {
    const auto run = folder_ / std::to_string(runs_++);
    auto toml = Config::from_text(
        "run = \"" + run.string() + "\"\n[data]\ntrain = [\"" + (folder_ / "train.txt").string() +
            "\"]\nvalidation = [\"" + (folder_ / "validation.txt").string() +
            "\"]\n[model]\nnum_layers = 1\nmodel_dim = 16\nz_dim = 8\nvalue_dim = 16\n"
            "ffn_hidden_dim = 16\ncema_ndim = 2\nchunk_size = 8\nnorm_num_groups = 4\n"
            "[schedule]\nlearning_rate = 1e-2\nwarmup_steps = 0\n[train]\nbatch = 4\ncontext = 24\n" +
            settings,
        "test.toml");
    const auto config = read_train_config(toml);
    const auto model_config = model::read_model_config(toml, 256);
    toml.finish();
    const auto corpora = open_corpora(config);
    const auto model = model::make_model(model_config, config.seed);
    Trainer trainer(config, *model, *corpora.tokenizer, *corpora.training, *corpora.validation);
    Losses losses;
    EXPECT_TRUE(trainer.run({&losses}));
    return losses;
  }

 private:
  testing::TemporaryFolder folder_;
  int runs_ = 0;
};

TEST_F(TrainerTest, Float8NeedsItsUnitsAndBfloat16) {
  const auto message = [&](const std::string& settings) {
    return testing::request_error([&] { train("steps = 1\nproducts = \"float8\"\n" + settings); });
  };
  EXPECT_TRUE(testing::contains(message(""), "set train.compute_type = \"bfloat16\""));
  EXPECT_TRUE(testing::contains(message("compute_type = \"bfloat16\"\n"),
                                "this device has no units for float8 products (train.products)"));
}

TEST_F(TrainerTest, MicroBatchesAddUpToTheBatch) {
  const auto whole = train("steps = 4\n");
  for (const char* micro : {"1", "2"}) {
    const auto parts = train(std::string("steps = 4\nmicro_batch = ") + micro + "\n");
    for (std::size_t i = 0; i < whole.steps.size(); ++i)
      EXPECT_NEAR(parts.steps[i], whole.steps[i], 1e-5) << i;
  }
}

TEST_F(TrainerTest, LearnsAndValidatesWhenItIsDue) {
  const auto losses = train("steps = 60\n[validation]\nevery = 20\n");
  ASSERT_EQ(losses.validations.size(), 3u);
  EXPECT_LT(losses.validations[2], losses.validations[0]);
  EXPECT_LT(losses.steps.back(), losses.steps.front() / 1.5);
}

}  // namespace
}  // namespace megalodon::train
