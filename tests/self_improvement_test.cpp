#include <algorithm>
#include <cmath>
#include <csignal>
#include <map>
#include <random>

#include "base/hash.h"
#include "base/json.h"
#include "program.h"

// The command improve on real configurations, killed, resumed, and given bad input.
namespace megalodon::testing {
namespace {
namespace fs = std::filesystem;

// Two models, three rounds, all filters that need no maze; about a second.
std::string reversal_config(const TemporaryFolder& folder, const std::string& improve = "") {
  const auto path = folder / "config.toml";
  write_text(
      path,
      "run = \"" + (folder / "run").string() +
          "\"\nseed = 3\n[task]\nname = \"reverse\"\nbase = 2\n[model]\ntype = \"llama\"\nnum_hidden_layers "
          "= 1\n"
          "hidden_size = 16\nintermediate_size = 32\nnum_attention_heads = 2\nposition_embedding = \"none\"\n"
          "[improve]\nmodels = 2\nrounds = 2\nproblems = 40\n" +
          improve +
          "filters = [\"vote\", \"length\", \"confidence\"]\n[vote]\nshare = 0.5\n[length]\nslack = 3\n"
          "[confidence]\nshare = 0.75\n[train]\nbatch = 4\n[first_round]\nlearning_rate = 1e-2\nstable_steps "
          "= 8\n"
          "[round]\nlearning_rate = 1e-2\nstable_steps = 6\ndecay_steps = 3\n[evaluation]\nproblems = 8\n"
          "[generate]\nbatch = 8\n[checkpoint]\nevery = 3\n");
  return path.string();
}

constexpr const char* kLastCheckpoint = "step-26";

// What must be equal: loss and gradient norm of every step, every evaluation, all self-made data, the final
// weights and moments.
std::map<std::string, std::string> result_of(const fs::path& run) {
  std::map<std::string, std::string> result;
  const auto text = read_file(run / "metrics.jsonl");
  for (std::size_t begin = 0; begin < text.size();) {
    const auto end = text.find('\n', begin);
    auto line = Json::parse(text.substr(begin, end - begin));
    begin = end + 1;
    const auto kind = line["kind"].get<std::string>();
    if (kind == "start" || kind == "resume") continue;
    line.erase("seconds");
    const auto key = kind + " " + line["step"].dump() + " " + line.value("difficulty", "");
    EXPECT_FALSE(result.contains(key)) << key << " is there twice";
    result[key] = line.dump();
  }
  for (const auto& folder : {run / "rounds", run / "checkpoints" / kLastCheckpoint}) {
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      if (entry.is_regular_file() && entry.path().filename() != "times.jsonl")
        result[fs::relative(entry.path(), run).string()] = hex(xxh3_of_file(entry.path()));
    }
  }
  return result;
}

void finish(const TemporaryFolder& folder, const std::string& config) {
  const auto outcome = run(folder, {"improve", config, "--resume"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
}

TEST(Improve, LeavesARunDirectory) {
  const TemporaryFolder folder;
  const auto config = reversal_config(folder);
  const auto outcome = run(folder, {"improve", config});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "report in"));
  for (const char* name :
       {"config.toml", "metrics.jsonl", "report.html", "rounds/1/data.jsonl", "rounds/2/labels.json",
        "rounds/2/evaluation.jsonl", "checkpoints/step-26/model-1/model.safetensors"}) {
    EXPECT_TRUE(fs::exists(folder / "run" / name)) << name;
  }
  EXPECT_FALSE(fs::is_empty(folder / "run/tb"));
  EXPECT_EQ(run(folder, {"info", (folder / "run").string()}).exit_code, 0);
  const auto answer =
      run(folder, {"generate", (folder / "run").string(), "--prompt", "12=", "--max-tokens", "3"});
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
}

TEST(Improve, LeavesModelsThatEvalAsks) {
  const TemporaryFolder folder;
  ASSERT_EQ(run(folder, {"improve", reversal_config(folder)}).exit_code, 0);
  const auto model = (folder / "run/rounds/2/model/model-1").string();
  const auto outcome = run(folder, {"eval", model, "--task", "reverse", "--difficulty", "1,4", "--problems",
                                    "6", "--seed", "5", "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto end_of_line = outcome.out.find('\n');
  const auto one = Json::parse(outcome.out.substr(0, end_of_line)),
             four = Json::parse(outcome.out.substr(end_of_line + 1));
  EXPECT_TRUE(one["training_may_have_seen_these"]);
  EXPECT_EQ(four["difficulty"], "4");
  const auto wrong = static_cast<int>(std::lround(6 * (1 - four["accuracy"].get<double>())));
  EXPECT_EQ(four["wrong"].size(), static_cast<std::size_t>(std::min(wrong, 4)));
  for (const auto& w : four["wrong"]) {
    const auto prompt = w["prompt"].get<std::string>(), target = w["target"].get<std::string>();
    EXPECT_EQ(prompt, std::string(target.rbegin(), target.rend()) + "=");
    EXPECT_NE(w["answer"].get<std::string>() + (w["ended"].get<bool>() ? "" : "..."), target);
  }
  expect_refusal(folder, {"eval", model, "--task", "reverse"}, 2, {"--difficulty"});
  expect_refusal(folder, {"eval", model, "--task", "reverse", "--difficulty", "0"}, 2, {"1 to 1000"});
  expect_refusal(folder, {"eval", model, "--task", "copies", "--difficulty", "3"}, 2, {"copies", "maze"});
  expect_refusal(folder, {"eval", model, "--task", "reverse_add", "--difficulty", "3"}, 2,
                 {"no token for '+'", "reverse_add"});
  expect_refusal(folder, {"eval", model}, 2, {"--data"});
}

TEST(Improve, WhatAKilledProcessWasWritingGoes) {
  const TemporaryFolder folder;
  const auto config = reversal_config(folder);
  finish(folder, config);
  const auto stray = folder / "run/rounds/1/plan.json.tmp-0a1b2c3d";
  write_file_atomically(stray, "{");
  finish(folder, config);
  EXPECT_FALSE(fs::exists(stray));
}

TEST(Improve, TheResolvedConfigurationRunsAgain) {
  const TemporaryFolder folder;
  finish(folder, reversal_config(folder));
  const auto expected = result_of(folder / "run");
  const auto again = (folder / "again").string();
  const auto outcome =
      run(folder, {"improve", (folder / "run/config.toml").string(), "--set", "run=" + again});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(result_of(again), expected);
}

TEST(Improve, AfterSigkillAtRandomMomentsEqualsTheUninterruptedRun) {
  const TemporaryFolder whole;
  const auto started = std::chrono::steady_clock::now();
  finish(whole, reversal_config(whole));
  const auto duration = std::chrono::steady_clock::now() - started;
  const auto expected = result_of(whole / "run");
  ASSERT_GT(expected.size(), 26u);
  std::mt19937 random(11);
  int killed = 0;
  for (int trial = 0; trial < 10; ++trial) {
    const TemporaryFolder folder;
    const auto config = reversal_config(folder);
    for (int kills = 0; kills < 2; ++kills) {  // the second one may hit the resumed run
      Program program(folder, {"improve", config, "--resume"});
      std::this_thread::sleep_for(duration * std::uniform_real_distribution<double>(0.05, 1.0)(random));
      if (program.running()) ++killed;
      program.signal(SIGKILL);
      program.wait();
    }
    finish(folder, config);
    EXPECT_EQ(result_of(folder / "run"), expected) << "trial " << trial;
  }
  EXPECT_GE(killed, 5);  // or the test shows nothing
}

TEST(Improve, AfterAnInterruptionGoesOn) {
  const TemporaryFolder whole, folder;
  finish(whole, reversal_config(whole));
  const auto config = reversal_config(folder);
  Program program(folder, {"improve", config});
  while (program.running() && !fs::exists(folder / "run/rounds/1/answers.jsonl"))
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  program.signal(SIGINT);
  const auto outcome = program.wait();
  EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "--resume"));
  finish(folder, config);
  EXPECT_EQ(result_of(folder / "run"), result_of(whole / "run"));
}

TEST(Improve, RefusesBadInput) {
  const TemporaryFolder folder;
  const auto config = reversal_config(folder);
  const auto refuse = [&](const std::string& set, const std::vector<std::string>& parts) {
    expect_refusal(folder, {"improve", config, "--set", set}, 2, parts);
  };
  refuse("task.name=adition", {"unknown task 'adition'", "task.name", "choose one of"});
  refuse("improve.filters=[\"votes\"]", {"unknown filter 'votes'", "did you mean 'vote'?"});
  refuse("improve.filters=[\"verifier\"]", {"cannot be verified", "mazes"});
  refuse("task.base=100000", {"task.base", "from 1 to"});
  refuse("improve.rounds=100000", {"improve.rounds", "from 0 to"});
  refuse("improve.models=1", {"a vote of one model", "improve.models"});
  refuse("model.type=megalodon", {"model."});
  refuse("improve.modles=3", {"unknown key 'improve.modles'", "did you mean 'improve.models'?"});
  EXPECT_FALSE(fs::exists(folder / "run"));
}

TEST(Improve, RefusesAnotherRunsDirectoryAndAnEditedConfiguration) {
  const TemporaryFolder folder;
  const auto config = reversal_config(folder);
  finish(folder, config);
  expect_refusal(folder, {"improve", config}, 2, {"holds a run", "--resume"});
  expect_refusal(folder,
                 {"improve", config, "--resume", "--set", "improve.problems=41", "--set", "vote.share=0.9"},
                 2, {"improve.problems: 40 -> 41", "vote.share: 0.5 -> 0.9"});
  EXPECT_EQ(run(folder, {"improve", config, "--resume", "--set", "checkpoint.keep=5"}).exit_code, 0);
}

TEST(Improve, SaysSoWhereTheFiltersDropEverything) {
  const TemporaryFolder folder, strict;
  const auto config = reversal_config(folder);
  const auto outcome = run(folder, {"improve", config, "--set", "confidence.share=0"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "the filters dropped all 80 answers"));
  EXPECT_TRUE(contains(outcome.err, "data of earlier rounds"));
  const auto stop = run(
      strict, {"improve", reversal_config(strict, "when_empty = \"stop\"\n"), "--set", "confidence.share=0"});
  EXPECT_EQ(stop.exit_code, 1);
  EXPECT_TRUE(contains(stop.err, "error: round 1: the filters dropped all 80 answers"));
}

// An untrained model does not end its answers where it should: the bound does.
TEST(Improve, BoundsAnswersThatNeverEnd) {
  const TemporaryFolder folder;
  const auto config = reversal_config(folder);
  const auto outcome =
      run(folder, {"improve", config, "--set", "first_round.learning_rate=0", "--set",
                   "round.learning_rate=0", "--set", "length.slack=100", "--set", "confidence.share=1"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "never ended"));
  const auto labels = Json::parse(read_file(folder / "run/rounds/1/labels.json"));
  EXPECT_GT(labels["unended"].get<int>(), 0);
  const auto line = read_file(folder / "run/rounds/1/answers.jsonl");
  const auto answer = Json::parse(line.substr(0, line.find('\n')))["answers"][0];
  EXPECT_LE(answer["tokens"].get<int>(), 4);  // three digits and the end
}

class Twins : public ::testing::TestWithParam<const char*> {};

// The small configuration of each task, two rounds of few steps.
TEST_P(Twins, RunTwoRounds) {
  const TemporaryFolder folder;
  std::vector<std::string> arguments{"improve",
                                     std::string(MEGALODON_CONFIGS) + "/" + GetParam() + "-small.toml"};
  arguments.insert(arguments.end(), {"--set", "run=" + (folder / "run").string()});
  for (const char* set :
       {"improve.rounds=2", "improve.problems=12", "first_round.warmup_steps=1", "first_round.stable_steps=3",
        "first_round.decay_steps=1", "round.stable_steps=2", "round.decay_steps=1", "evaluation.problems=4",
        "evaluation.final_problems=5", "train.batch=8"}) {
    arguments.insert(arguments.end(), {"--set", set});
  }
  const auto outcome = run(folder, arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto metrics = read_file(folder / "run/metrics.jsonl");
  EXPECT_TRUE(contains(metrics, "\"kind\":\"round\",\"round\":2"));
  for (const char* round : {"1", "2"}) {
    const auto labels = Json::parse(read_file(folder / "run/rounds" / round / "labels.json"));
    EXPECT_GE(labels["generated"].get<int>(), 12);
    EXPECT_TRUE(fs::exists(folder / "run/rounds" / round / "data.jsonl"));
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, Twins,
                         ::testing::Values("addition", "forward-addition", "copy", "reversal",
                                           "multiplication", "maze-hops", "maze-nodes"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// The recipes of full size are read whole; their models are built, and nothing else is asked of them here.
TEST(Recipes, AreReadWhole) {
  const TemporaryFolder folder;
  for (const char* name : {"addition", "addition-accelerated", "forward-addition", "copy", "reversal",
                           "multiplication", "maze-hops", "maze-nodes"}) {
    const auto config = std::string(MEGALODON_CONFIGS) + "/" + name + ".toml";
    // A run directory that cannot be made comes after every key was read.
    const auto outcome = run(folder, {"improve", config, "--set", "run=/proc/none"});
    EXPECT_EQ(outcome.exit_code, 2);
    EXPECT_TRUE(contains(outcome.err, "the run directory cannot be made")) << outcome.err;
  }
}

}  // namespace
}  // namespace megalodon::testing
