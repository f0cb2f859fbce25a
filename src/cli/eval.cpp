#include <cmath>
#include <cstdio>
#include <numbers>

#include "base/error.h"
#include "base/file.h"
#include "base/system.h"
#include "cli/command.h"
#include "data/corpus.h"
#include "data/tokenizer.h"
#include "evaluate/perplexity.h"
#include "improve/evaluation.h"
#include "model/model_folder.h"
#include "ops/device.h"
#include "ops/product.h"
#include "tasks/task.h"

namespace megalodon::cli {
namespace {

struct Options {
  std::string model, task = "ppl", data, device = "auto", compute_type = "float32", name,
                     split = "validation";
  std::vector<int64_t> contexts{2048};
  int64_t targets = 0, windows = 8, interval = 65536, tokens = 0, piece = 0, problems = 1024, batch = 512;
  std::vector<std::string> difficulties;
  uint64_t seed = 1;
  bool truncate_statistics = false, json = false;
};

// The tokens of a text file, or of a folder of shards.
std::vector<int32_t> read_tokens(const Options& o, const data::Tokenizer& tokenizer) {
  std::vector<int32_t> tokens;
  if (std::filesystem::is_directory(o.data)) {
    const data::Corpus corpus(o.data, o.split);
    corpus.check_tokenizer(tokenizer);
    tokens.resize(static_cast<std::size_t>(corpus.tokens()));
    corpus.read(0, tokens);
  } else {
    tokens = tokenizer.encode(MappedFile(o.data).text());
  }
  if (o.tokens > 0 && static_cast<std::size_t>(o.tokens) < tokens.size())
    tokens.resize(static_cast<std::size_t>(o.tokens));
  if (tokens.size() < 2) fail_request("fewer than two tokens", o.data, "give more text");
  return tokens;
}

void report_perplexity(const Options& o, const data::Tokenizer& tokenizer,
                       const evaluate::PerplexityResult& r) {
  const double bytes = static_cast<double>(tokenizer.decode(r.targets).size());
  const double bits = r.loss * static_cast<double>(r.tokens) / std::numbers::ln2 / bytes;
  if (o.json) {
    return print_json({{"kind", "ppl"},
                       {"model", o.name},
                       {"context", r.context},
                       {"loss", r.loss},
                       {"perplexity", std::exp(r.loss)},
                       {"bits_per_byte", bits},
                       {"tokens", r.tokens},
                       {"seconds", r.seconds}});
  }
  std::printf("context %8lld  loss %.4f  perplexity %.3f  bits/byte %.4f  (%lld tokens, %.1f s)\n",
              static_cast<long long>(r.context), r.loss, std::exp(r.loss), bits,
              static_cast<long long>(r.tokens), r.seconds);
  std::fflush(stdout);
}

void report_stream(const Options& o, const evaluate::StreamPoint& p) {
  if (o.json) {
    return print_json({{"kind", "stream"},
                       {"model", o.name},
                       {"position", p.position},
                       {"loss", p.loss},
                       {"seconds_per_token", p.seconds_per_token},
                       {"resident_bytes", p.resident_bytes}});
  }
  std::printf("position %10lld  loss %.4f  %.2f us a token  resident %.1f MB\n",
              static_cast<long long>(p.position), p.loss, p.seconds_per_token * 1e6,
              static_cast<double>(p.resident_bytes) / 1e6);
  std::fflush(stdout);
}

// Exact match of greedy answers to problems that no training draws.
void answer_problems(const Options& o, const model::LanguageModel& model, const data::Tokenizer& tokenizer,
                     const tasks::Task& task, std::span<const tasks::Difficulty> difficulties) {
  improve::check_spells(tokenizer, task, o.model);
  improve::Solver solver(model, tokenizer, task, o.batch);
  for (const auto difficulty : difficulties) {
    const double started = monotonic_seconds();
    const auto result = improve::evaluate(solver, task, difficulty, o.problems, o.seed);
    const double seconds = monotonic_seconds() - started;
    if (o.json) {
      Json json = improve::to_json(result);
      json.update({{"kind", "problems"},
                   {"model", o.name},
                   {"task", task.name()},
                   {"accuracy", result.mean()},
                   {"seconds", seconds}});
      print_json(json);
      continue;
    }
    std::printf("%s %s  exact match %.4f  (%lld problems%s, %.1f s)\n", o.task.c_str(),
                result.difficulty.c_str(), result.mean(), static_cast<long long>(result.problems),
                result.separable ? "" : ", training may have seen these", seconds);
    std::fflush(stdout);
  }
}

int run(const Options& o) {
  const bool on_text = o.task == "ppl" || o.task == "stream";
  if (on_text && o.data.empty()) fail_request("no text", "--data", "name a text file or a folder of shards");
  if (!on_text && o.difficulties.empty())
    fail_request("no difficulty", "--difficulty", "give one or more, with commas between: 10,20");
  const auto* task = on_text ? nullptr : &tasks::find_task(o.task);
  std::vector<tasks::Difficulty> difficulties;
  for (const auto& text : o.difficulties) difficulties.push_back(task->difficulty(text));
  const auto device = ops::open_device(o.device);
  const auto folder = model_folder(o.model);
  const auto model = model::load_model(folder, o.compute_type == "bfloat16" ? at::kBFloat16 : at::kFloat);
  model->to(device);
  const auto tokenizer = data::load_tokenizer(folder);
  check_fits(*tokenizer, *model, o.model);
  const ops::ConstantWeights constant_weights;
  if (task != nullptr) {
    answer_problems(o, *model, *tokenizer, *task, difficulties);
    return 0;
  }
  const auto tokens = read_tokens(o, *tokenizer);
  const model::StreamOptions stream{.piece = o.piece, .truncate_statistics = o.truncate_statistics};
  if (o.task == "stream") {
    evaluate::stream_document(*model, tokens, o.interval, stream,
                              [&](const auto& point) { report_stream(o, point); });
    return 0;
  }
  evaluate::perplexity_by_context(*model, tokens, {o.contexts, o.targets, o.windows, stream},
                                  [&](const auto& result) { report_perplexity(o, *tokenizer, result); });
  return 0;
}

}  // namespace

void add_eval(CLI::App& program, Run& chosen) {
  auto* command = program.add_subcommand("eval", "Measure a model on text or on a task's problems");
  auto o = std::make_shared<Options>();
  command->add_option("MODEL", o->model, "a model or run directory")->required();
  std::vector<std::string> tasks{"ppl", "stream"};
  for (const auto name : tasks::task_names()) tasks.emplace_back(name);
  command
      ->add_option("--task", o->task,
                   "ppl: loss by context length; stream: one document at constant memory; else the problems "
                   "of a task of self-improvement, answered greedily")
      ->check(CLI::IsMember(tasks))
      ->capture_default_str();
  command->add_option("--data", o->data, "ppl, stream: a text file, or a folder of token shards");
  command->add_option("--split", o->split, "of a folder of shards: train or validation")
      ->capture_default_str();
  command->add_option("--context", o->contexts, "ppl: context lengths in tokens, with commas between")
      ->delimiter(',');
  command->add_option("--targets", o->targets,
                      "ppl: tokens scored a window; 0: as the smallest context allows");
  command->add_option("--windows", o->windows, "ppl: windows spread over the data")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--interval", o->interval, "stream: tokens between two points")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--tokens", o->tokens, "read this many tokens of the data at most")
      ->check(CLI::PositiveNumber);
  command->add_option("--piece", o->piece, "tokens a call; 0: two chunks")->check(CLI::NonNegativeNumber);
  command->add_flag("--truncate-statistics", o->truncate_statistics,
                    "norm statistics of the last 6 to 8 chunks alone");
  command->add_option("--difficulty", o->difficulties, "problems: as in docs/tasks.md, with commas between")
      ->delimiter(',');
  command->add_option("--problems", o->problems, "of each difficulty")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--batch", o->batch, "problems answered at once")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--seed", o->seed, "of the problems")->capture_default_str();
  command->add_option("--compute-type", o->compute_type, "float32 or bfloat16")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  command->add_option("--name", o->name, "the model's name in the output; its folder by default");
  add_device(*command, o->device);
  command->add_flag("--json", o->json, "print one JSON object a line");
  command->callback([o, &chosen] {
    chosen = [o] {
      if (o->name.empty()) o->name = std::filesystem::path(o->model).filename().string();
      return run(*o);
    };
  });
}

}  // namespace megalodon::cli
