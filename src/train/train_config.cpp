#include "train/train_config.h"

#include <array>
#include <limits>

namespace megalodon::train {

TrainConfig read_train_config(Config& config) {
  constexpr int64_t most = int64_t{1} << 40;
  constexpr std::array<std::string_view, 3> devices{"auto", "cpu", "cuda"};
  constexpr std::array<std::string_view, 2> types{"float32", "bfloat16"}, products{"compute_type", "float8"};
  TrainConfig c;
  c.run = config.string("run");
  c.seed = static_cast<uint64_t>(config.integer("seed", 0, std::numeric_limits<int64_t>::max(), 1));
  c.device = config.choice("device", devices, "auto");
  c.deterministic = config.boolean("deterministic", false);

  c.data.train = config.strings("data.train");
  if (c.data.train.empty()) config.fail("data.train", "no training data", "name at least one file or folder");
  c.data.validation = config.strings("data.validation", {});
  c.data.validation_share =
      config.number("data.validation_share", 0, 0.5, c.data.validation.empty() ? 0.05 : 0.0);
  c.data.tokenizer = config.string("data.tokenizer", "byte");

  c.from = config.string("train.from", "");
  c.steps = config.integer("train.steps", 1, most);
  c.batch = config.integer("train.batch", 1, 1 << 20);
  c.micro_batch = config.integer("train.micro_batch", 1, 1 << 20, c.batch);
  c.context = config.integer("train.context", 2, most);
  c.compute_type = config.choice("train.compute_type", types, "float32");
  c.products = config.choice("train.products", products, "compute_type");
  c.recompute = config.boolean("train.recompute", true);
  if (c.products == "float8" && c.compute_type != "bfloat16") {
    config.fail("train.products", "float8 products of float32 activations are not supported",
                "set train.compute_type = \"bfloat16\"");
  }
  if (c.batch % c.micro_batch != 0) {
    config.fail("train.micro_batch", "does not divide train.batch = " + std::to_string(c.batch),
                "choose a divisor");
  }
  c.optimizer = read_optimizer(config);
  c.schedule = read_schedule(config, c.steps);
  c.validation_every = config.integer("validation.every", 0, most, 0);
  c.validation_windows = config.integer("validation.windows", 1, 1 << 20, 16);
  c.checkpoint_every = config.integer("checkpoint.every", 0, most, 0);
  c.checkpoint_keep = config.integer("checkpoint.keep", 1, 1000, 2);
  return c;
}

bool may_change_on_resume(std::string_view key) {
  return key == "device" || key == "train.recompute" || key.starts_with("checkpoint.") ||
         key.starts_with("validation.");
}

}  // namespace megalodon::train
