#include <cstdio>

#include "base/log.h"
#include "cli/command.h"
#include "data/prepare.h"

namespace megalodon::cli {
namespace {

struct Options {
  std::vector<std::string> inputs, validation;
  std::string tokenizer = "byte", out;
  double validation_share = 0;
  uint64_t seed = 1;
  bool json = false;
};

int prepare(const Options& o) {
  const std::vector<std::filesystem::path> inputs(o.inputs.begin(), o.inputs.end());
  const auto tokenizer = data::open_tokenizer(o.tokenizer, inputs);
  data::PrepareOptions options;
  options.validation_share = o.validation_share;
  options.validation_inputs.assign(o.validation.begin(), o.validation.end());
  options.seed = o.seed;
  const auto summary = data::prepare(inputs, *tokenizer, o.out, options);
  const auto facts = [](const data::SplitSummary& s) {
    return Json{{"documents", s.documents}, {"tokens", s.tokens}, {"bytes", s.bytes}, {"shards", s.shards}};
  };
  if (o.json) {
    print_json({{"train", facts(summary.train)},
                {"validation", facts(summary.validation)},
                {"empty_documents", summary.empty_documents},
                {"vocabulary", tokenizer->vocabulary_size()}});
    return 0;
  }
  for (const auto& [name, split] :
       {std::pair("train", summary.train), std::pair("validation", summary.validation)}) {
    std::printf("%-10s  %lld documents, %s tokens, %s in %lld shards\n", name,
                static_cast<long long>(split.documents),
                human_count(static_cast<double>(split.tokens)).c_str(),
                human_bytes(static_cast<double>(split.bytes)).c_str(), static_cast<long long>(split.shards));
  }
  return 0;
}

}  // namespace

void add_data(CLI::App& program, Run& chosen) {
  auto* data = program.add_subcommand("data", "Prepare training data");
  data->require_subcommand(1);
  auto* command = data->add_subcommand("prepare", "Text or jsonl to token shards");
  auto o = std::make_shared<Options>();
  command
      ->add_option("INPUT", o->inputs, "text files, jsonl files (\"text\" of each line), or folders of them")
      ->required();
  command->add_option("--tokenizer", o->tokenizer, "byte, character, or a folder or file of a tokenizer")
      ->capture_default_str();
  command->add_option("--out", o->out, "the new folder")->required();
  command->add_option("--validation", o->validation, "files to validate on");
  command->add_option("--validation-share", o->validation_share, "or this share of the documents")
      ->check(CLI::Range(0.0, 0.5));
  command->add_option("--seed", o->seed, "of the choice of those")->capture_default_str();
  command->add_flag("--json", o->json, "print one JSON object");
  command->callback([o, &chosen] { chosen = [o] { return prepare(*o); }; });
}

}  // namespace megalodon::cli
