#include <cstdio>

#include "base/log.h"
#include "cli/command.h"
#include "data/tokenizer.h"
#include "model/model_folder.h"

namespace megalodon::cli {
namespace {

struct Options {
  std::string model;
  bool json = false;
};

int info(const Options& o) {
  const auto folder = model_folder(o.model);
  const auto model = model::load_model(folder);
  const auto tokenizer = data::load_tokenizer(folder);
  auto facts = model::to_json(model->config());
  facts["parameters"] = model->parameter_count();
  facts["state_bytes"] = model->fresh_state(1).bytes();
  facts["state_grows"] = model::model_type(model->config()) == "llama";
  facts["tokenizer"] = tokenizer->kind();
  if (o.json) {
    print_json(facts);
    return 0;
  }
  for (const auto& [key, value] : facts.items()) {
    std::printf("%-24s %s\n", key.c_str(),
                value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
  }
  return 0;
}

}  // namespace

void add_info(CLI::App& program, Run& chosen) {
  auto* command =
      program.add_subcommand("info", "Say what a model is: architecture, parameters, state size, tokenizer");
  auto o = std::make_shared<Options>();
  command->add_option("MODEL", o->model, "a model or run directory")->required();
  command->add_flag("--json", o->json, "print one JSON object");
  command->callback([o, &chosen] { chosen = [o] { return info(*o); }; });
}

}  // namespace megalodon::cli
