#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "base/error.h"
#include "base/file.h"
#include "base/signals.h"
#include "cli/command.h"
#include "data/tokenizer.h"
#include "generate/session.h"
#include "model/model_folder.h"
#include "ops/device.h"
#include "ops/product.h"

namespace megalodon::cli {
namespace {

struct Options {
  std::string model, prompt, prompt_file, state_in, state_out, device = "auto", compute_type = "float32";
  CLI::Option* prompt_given = nullptr;
  int64_t max_tokens = 256;
  generate::SamplingOptions sampling;
  bool truncate_statistics = false, json = false;
};

// Standard input in blocks, so that its size does not matter.
void read_stdin(const data::Tokenizer& tokenizer, generate::Session& session) {
  data::StreamEncoder encoder(tokenizer);
  std::vector<int32_t> ids;
  std::string block(1 << 20, '\0');
  while (std::cin.read(block.data(), static_cast<std::streamsize>(block.size())) || std::cin.gcount() > 0) {
    encoder.push({block.data(), static_cast<std::size_t>(std::cin.gcount())}, ids);
    session.read(ids);
    ids.clear();
  }
  encoder.finish(ids);
  session.read(ids);
}

void read_prompt(const Options& o, const data::Tokenizer& tokenizer, generate::Session& session) {
  if (o.prompt_given->count() > 0) {
    session.read(tokenizer.encode(o.prompt));
  } else if (!o.prompt_file.empty()) {
    const MappedFile file(o.prompt_file);
    session.read(tokenizer.encode(file.text()));
  } else if (o.state_in.empty() || !isatty(STDIN_FILENO)) {
    read_stdin(tokenizer, session);
  }
}

int run(const Options& o) {
  const auto device = ops::open_device(o.device);
  const auto type = o.compute_type == "bfloat16" ? at::kBFloat16 : at::kFloat;
  const auto folder = model_folder(o.model);
  const auto model = model::load_model(folder, type);
  model->to(device);
  const auto tokenizer = data::load_tokenizer(folder);
  check_fits(*tokenizer, *model, o.model);
  const model::StreamOptions stream{.truncate_statistics = o.truncate_statistics};
  const ops::ConstantWeights constant_weights;
  auto session =
      o.state_in.empty() ? generate::Session(*model, stream) : generate::Session(*model, o.state_in, stream);
  read_prompt(o, *tokenizer, session);

  catch_interrupts();
  data::StreamDecoder decoder(*tokenizer, /*continues=*/true);
  std::string text;
  const char* reason = "length";
  int64_t drawn = 0;
  for (; drawn < o.max_tokens && !interrupted(); ++drawn) {
    const auto token = session.draw(o.sampling);
    if (token == tokenizer->end_of_document()) {
      reason = "stop";
      break;
    }
    const auto piece = decoder.push(static_cast<int32_t>(token));
    text += piece;
    if (!o.json) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
  }
  const auto rest = decoder.finish();
  text += rest;
  if (o.json) {
    print_json(
        {{"text", text}, {"tokens", drawn}, {"finish_reason", reason}, {"position", session.position()}});
  } else {
    std::printf("%s\n", rest.c_str());
  }
  if (!o.state_out.empty()) session.save(o.state_out);
  return 0;
}

}  // namespace

void add_generate(CLI::App& program, Run& chosen) {
  auto* command = program.add_subcommand("generate", "Continue a text; reads stdin where no prompt is given");
  auto o = std::make_shared<Options>();
  command->add_option("MODEL", o->model, "a model or run directory")->required();
  o->prompt_given = command->add_option("--prompt", o->prompt, "the text to continue");
  command->add_option("--prompt-file", o->prompt_file, "a file that holds it")->excludes(o->prompt_given);
  command->add_option("--max-tokens", o->max_tokens, "tokens to draw at most")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--temperature", o->sampling.temperature, "0: the likeliest token each time")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command->add_option("--top-k", o->sampling.top_k, "draw among the k likeliest; 0: all")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--top-p", o->sampling.top_p, "draw among the fewest that have this probability")
      ->check(CLI::Range(1e-9, 1.0))
      ->capture_default_str();
  command->add_option("--seed", o->sampling.seed, "of the draws")->capture_default_str();
  command->add_option("--state-in", o->state_in, "go on from this state");
  command->add_option("--state-out", o->state_out, "save the state at the end");
  command->add_flag("--truncate-statistics", o->truncate_statistics,
                    "norm statistics of the last 6 to 8 chunks alone");
  command->add_option("--compute-type", o->compute_type, "float32 or bfloat16")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  add_device(*command, o->device);
  command->add_flag("--json", o->json, "print one JSON object");
  command->callback([o, &chosen] { chosen = [o] { return run(*o); }; });
}

}  // namespace megalodon::cli
