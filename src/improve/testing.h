#pragma once
#include <string>

#include "base/testing.h"
#include "data/tokenizer.h"
#include "improve/config.h"
#include "model/language_model.h"

namespace megalodon::improve::testing {

// A run of three rounds that takes a second: string reversal by models of a few thousand parameters.
struct SmallRun {
  ImproveConfig config;
  std::unique_ptr<data::Tokenizer> tokenizer;
  std::unique_ptr<model::LanguageModel> models;

  explicit SmallRun(const std::filesystem::path& run, const std::string& improve = "models = 2\n",
                    const std::string& sections = "",
                    const std::string& task = "name = \"reverse\"\nbase = 2\n",
                    const std::string& type = "llama", const std::string& model_keys = "") {
    const std::string model =
        type == "llama"
            ? "num_hidden_layers = 1\nhidden_size = 16\nintermediate_size = 32\nnum_attention_heads = 2\n"
              "position_embedding = \"none\"\n"
            : "num_layers = 1\nmodel_dim = 16\nnum_heads = 2\nz_dim = 8\nvalue_dim = 16\nffn_hidden_dim = "
              "32\n"
              "cema_ndim = 2\nchunk_size = 8\nnorm_num_groups = 4\n";
    auto toml = Config::from_text(
        "run = \"" + run.string() + "\"\nseed = 5\n[task]\n" + task + "[model]\ntype = \"" + type + "\"\n" +
            model + model_keys + "[improve]\nrounds = 2\nproblems = 20\n" + improve +
            "[train]\nbatch = 4\ncompute_type = \"float32\"\n[first_round]\nlearning_rate = "
            "1e-2\nwarmup_steps = 2\n"
            "stable_steps = 4\n[round]\nlearning_rate = 1e-2\nstable_steps = 3\ndecay_steps = 2\n"
            "[evaluation]\nproblems = 6\nbeyond = 1\n[generate]\nbatch = 8\n[checkpoint]\nevery = 2\n" +
            sections,
        "small.toml");
    config = read_improve_config(toml);
    tokenizer = data::make_symbol_tokenizer(config.task->symbols());
    const auto model_config = model::read_model_config(toml, tokenizer->vocabulary_size());
    toml.finish();
    std::vector<uint64_t> seeds;
    for (int64_t k = 0; k < config.models; ++k) seeds.push_back(static_cast<uint64_t>(100 + k));
    models = model::make_stack(model_config, seeds);
  }
};

}  // namespace megalodon::improve::testing
