#include <sys/file.h>
#include <sys/resource.h>

#include <map>
#include <sstream>

#include "base/json.h"
#include "program.h"

// The commands, good input and bad.
namespace megalodon::testing {
namespace {
namespace fs = std::filesystem;

// One trained model serves all tests of the commands that read one.
class Trained : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder;
    const auto outcome = run(*folder_, {"train", small_config(*folder_)});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  }
  static void TearDownTestSuite() { delete folder_; }
  static std::string model() { return (*folder_ / "run").string(); }
  static std::string text() { return (*folder_ / "text/0.txt").string(); }
  static inline TemporaryFolder* folder_ = nullptr;
};

TEST_F(Trained, LeavesARunDirectory) {
  const fs::path run_folder = model();
  for (const char* name :
       {"config.toml", "metrics.jsonl", "report.html", "checkpoints/step-12/model.safetensors",
        "checkpoints/step-12/config.json", "checkpoints/step-12/tokenizer.json"}) {
    EXPECT_TRUE(fs::exists(run_folder / name)) << name;
  }
  EXPECT_FALSE(fs::is_empty(run_folder / "tb"));
}

TEST_F(Trained, TheResolvedConfigurationTrainsAgain) {
  const TemporaryFolder folder;
  const auto again = (folder / "again").string();
  const auto outcome = run(folder, {"train", model() + "/config.toml", "--set", "run=" + again});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(read_file(fs::path(again) / "checkpoints/step-12/model.safetensors"),
            read_file(fs::path(model()) / "checkpoints/step-12/model.safetensors"));
}

TEST_F(Trained, InfoSaysWhatItIs) {
  const auto outcome = run(*folder_, {"info", model(), "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto facts = Json::parse(outcome.out);
  EXPECT_EQ(facts["model_type"], "megalodon");
  EXPECT_EQ(facts["tokenizer"], "byte");
  EXPECT_GT(facts["parameters"], 10000);
  EXPECT_GT(facts["state_bytes"], 1000);
}

TEST_F(Trained, GeneratesTheSameFromPromptFileAndStdin) {
  const std::string prompt = sample_text(5000);
  write_text(*folder_ / "prompt", prompt);
  const std::vector<std::string> tail{"--max-tokens", "20", "--seed", "4", "--json"};
  const auto with = [&](std::vector<std::string> arguments, const std::string& input = "") {
    arguments.insert(arguments.begin(), {"generate", model()});
    arguments.insert(arguments.end(), tail.begin(), tail.end());
    const auto outcome = run(*folder_, arguments, input);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return Json::parse(outcome.out);
  };
  const auto file = with({"--prompt-file", (*folder_ / "prompt").string()});
  EXPECT_EQ(file, with({}, prompt));
  EXPECT_EQ(file["tokens"], 20);
  EXPECT_EQ(with({"--prompt", "the"}), with({}, "the"));
  EXPECT_NE(with({"--prompt", "the"})["text"], with({"--prompt", "a sea"})["text"]);
}

TEST_F(Trained, AStateFileContinuesAStream) {
  const auto generate = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"generate", model(), "--json"});
    const auto outcome = run(*folder_, arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return Json::parse(outcome.out)["text"].get<std::string>();
  };
  const auto state = (*folder_ / "state").string();
  const auto whole = generate({"--prompt", "the long", "--max-tokens", "30"});
  const auto first = generate({"--prompt", "the long", "--max-tokens", "11", "--state-out", state});
  const auto second = generate({"--state-in", state, "--max-tokens", "19"});
  EXPECT_EQ(first + second, whole);
}

TEST_F(Trained, EvaluatesByContextAndByStream) {
  auto outcome = run(*folder_, {"eval", model(), "--data", text(), "--context", "32,64,256", "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 3);
  const auto first = Json::parse(outcome.out.substr(0, outcome.out.find('\n')));
  EXPECT_EQ(first["context"], 32);
  EXPECT_NEAR(first["perplexity"].get<double>(), std::exp(first["loss"].get<double>()), 1e-6);
  outcome =
      run(*folder_, {"eval", model(), "--task", "stream", "--data", text(), "--interval", "500", "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_GT(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 2);
}

TEST_F(Trained, FineTunes) {
  const TemporaryFolder folder;
  const auto config = small_config(folder, "[model]\n");
  auto content = read_file(config);
  content = content.substr(0, content.find("[model]")) + content.substr(content.find("[train]"));
  content.erase(content.rfind("[model]"));
  write_text(config, content);
  const auto outcome = run(folder, {"train", config, "--set",
                                    "train.from=" + (fs::path(model()) / "checkpoints/step-12").string()});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto first_loss = [](const fs::path& run_folder) {
    const auto lines = read_file(run_folder / "metrics.jsonl");
    const auto begin = lines.find("\"loss\":") + 7;
    return std::stod(lines.substr(begin));
  };
  EXPECT_LT(first_loss(folder / "run"), first_loss(model()) - 0.5);
}

TEST_F(Trained, RefusesBadRequests) {
  const auto& f = *folder_;
  expect_refusal(f, {}, 2, {"subcommand"});
  expect_refusal(f, {"trian"}, 2, {});
  expect_refusal(f, {"info", (f / "nowhere").string()}, 2, {"nowhere"});
  expect_refusal(f, {"eval", model(), "--data", (f / "nowhere").string()}, 2, {"nowhere"});
  expect_refusal(f, {"eval", model(), "--data", text(), "--context", "100000"}, 2,
                 {"fewer than the largest context"});
  expect_refusal(f, {"eval", model(), "--data", text(), "--device", "tpu"}, 2, {"tpu", "cpu, cuda or auto"});
  expect_refusal(f, {"eval", model(), "--data", text(), "--device", "cuda"}, 2, {"--device"});
  write_text(f / "empty", "");
  expect_refusal(f, {"eval", model(), "--data", (f / "empty").string()}, 2, {"empty"});
  expect_refusal(f, {"generate", model(), "--prompt", ""}, 2, {"nothing to continue"});
  expect_refusal(f, {"generate", model(), "--state-in", text()}, 2, {"0.txt"});
  expect_refusal(f, {"train", (f / "missing.toml").string()}, 2, {"missing.toml"});
  expect_refusal(f, {"train", (f / "config.toml").string()}, 2, {"--resume"});
  expect_refusal(f, {"train", (f / "config.toml").string(), "--resume", "--set", "train.batch=8"}, 2,
                 {"train.batch: 4 -> 8"});
  expect_refusal(f, {"data", "prepare", text()}, 2, {"--out"});
}

TEST_F(Trained, RefusesDamagedModels) {
  const TemporaryFolder f;
  const auto copy = [&] {
    fs::remove_all(f / "m");
    fs::copy(fs::path(model()) / "checkpoints/step-12", f / "m");
    return f / "m";
  };
  const auto refused = [&](const fs::path& folder, const std::string& part) {
    expect_refusal(f, {"info", folder.string()}, 2, {part});
  };
  auto m = copy();
  fs::resize_file(m / "model.safetensors", 1000);
  refused(m, "model.safetensors");
  m = copy();
  write_text(m / "model.safetensors", "not a safetensors file");
  refused(m, "model.safetensors");
  m = copy();
  write_text(m / "config.json", "{\"model_type\": \"megalodon\"}");
  refused(m, "config.json");
  m = copy();
  write_text(m / "tokenizer.json", "[");
  refused(m, "tokenizer.json");
  m = copy();
  fs::remove(m / "tokenizer.json");
  refused(m, "tokenizer");
  m = copy();
  std::string characters;  // 300 of them, three bytes each: more ids than the model knows
  for (int i = 0; i < 300; ++i) {
    characters += {'\xE4', static_cast<char>(0xB8 + i / 64), static_cast<char>(0x80 + i % 64)};
  }
  write_text(m / "tokenizer.json", Json{{"type", "character"}, {"characters", characters}}.dump());
  expect_refusal(f, {"generate", m.string(), "--prompt", "a"}, 2, {"302 ids", "256"});
}

TEST(BadConfig, IsRefusedBeforeAnythingIsWritten) {
  const TemporaryFolder f;
  const auto config = small_config(f);
  const auto refused = [&](const std::string& setting, const std::vector<std::string>& parts) {
    expect_refusal(f, {"train", config, "--set", setting}, 2, parts);
    EXPECT_FALSE(fs::exists(f / "run")) << setting;
  };
  refused("trian.steps=3", {"trian.steps", "train.steps"});
  refused("train.steps=\"many\"", {"train.steps", "integer"});
  refused("model.chunk_size=0", {"model.chunk_size"});
  refused("model.norm_num_groups=5", {"model_dim"});
  refused("model.num_heads=3", {"num_heads"});
  refused("model.type=gpt", {"gpt", "llama"});
  refused("train.compute_type=float16", {"float16"});
  refused("train.micro_batch=3", {"micro_batch"});
  refused("device=tpu", {"tpu"});
  write_text(f / "broken.toml", "run = [\n");
  expect_refusal(f, {"train", (f / "broken.toml").string()}, 2, {"broken.toml:"});
}

TEST(BadData, IsRefused) {
  const TemporaryFolder f;
  const auto config = small_config(f);
  expect_refusal(f, {"train", config, "--set", "data.train=[\"" + (f / "nowhere").string() + "\"]"}, 2,
                 {"nowhere"});
  write_text(f / "bad.jsonl", "{\"text\": \"fine\"}\n{\"text\": 3}\n");
  expect_refusal(f, {"data", "prepare", (f / "bad.jsonl").string(), "--out", (f / "out").string()}, 2,
                 {"bad.jsonl:2"});
  EXPECT_FALSE(fs::exists(f / "out"));
}

TEST(Run, IsHeldByOneProcess) {
  const TemporaryFolder f;
  const auto config = small_config(f);
  Program first(f, {"train", config, "--set", "train.steps=100000"});
  while (first.running() && !fs::exists(f / "run/metrics.jsonl"))
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const TemporaryFolder elsewhere;
  expect_refusal(elsewhere, {"train", config, "--resume"}, 2, {(f / "run").string()});
  first.signal(SIGKILL);
  first.wait();
}

TEST(Run, StopsWhereTenStepsAreNotFinite) {
  const TemporaryFolder f;
  const auto outcome = run(
      f, {"train", small_config(f), "--set", "train.steps=60", "--set", "schedule.learning_rate=1e3", "--set",
          "optimizer.clip=0", "--set", "optimizer.weight_decay=10", "--set", "schedule.warmup_steps=0"});
  EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "skipped"));
  EXPECT_TRUE(contains(outcome.err, "error: 10 steps in a row were not finite"));
}

TEST(Bench, WritesATrace) {
  const TemporaryFolder f;
  const auto traced = [&](const std::string& file) -> std::vector<std::string> {
    return {"bench",    "train", "--preset",  "11M", "--batch",   "1",       "--context",        "32",
            "--device", "cpu",   "--repeats", "1",   "--profile", "--trace", (f / file).string()};
  };
  const auto outcome = run(f, traced("trace.json"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_FALSE(Json::parse(read_file(f / "trace.json"))["traceEvents"].empty());
  expect_refusal(f, traced("nowhere/trace.json"), 2, {"nowhere/trace.json", "folder"});
}

TEST(Bench, DecodesAtEachSize) {
  const TemporaryFolder f;
  const auto bench = [](const std::string& what) -> std::vector<std::string> {
    return {"bench",     what,       "--preset", "11M",       "--batch", "1,2",   "--context",
            "3,1000000", "--device", "cpu",      "--repeats", "1",       "--json"};
  };
  const auto outcome = run(f, bench("decode"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const auto* size : {"batch 1 at 3", "batch 1 at 1000000", "batch 2 at 3", "batch 2 at 1000000"})
    EXPECT_TRUE(contains(outcome.out, size)) << outcome.out;
  expect_refusal(f, bench("prefill"), 2, {"--batch", "decode"});

  auto traced = bench("decode");
  write_text(f / "trace.json", "of before");
  traced.insert(traced.end(), {"--profile", "--trace", (f / "trace.json").string()});
  expect_refusal(f, traced, 2, {"--batch", "one trace"});
  EXPECT_EQ(read_file(f / "trace.json"), "of before");
}

TEST(Bench, CountsTheWorkOfEachPass) {
  const TemporaryFolder f;
  const auto outcome = run(f, {"bench", "ops", "--batch", "1", "--context", "64", "--dim", "64", "--device",
                               "cpu", "--repeats", "1", "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  std::map<std::string, double> work;
  std::istringstream lines(outcome.out);
  for (std::string line; std::getline(lines, line);) {
    const auto figure = Json::parse(line);
    work[figure["name"]] = figure["rate"].get<double>() * figure["seconds"].get<double>();
  }
  const auto expect_work = [&](const std::string& name, double forward, double backward) {
    EXPECT_NEAR(work[name + " forward bfloat16"] / forward, 1, 1e-9) << name;
    EXPECT_NEAR(work[name + " backward bfloat16"] / backward, 1, 1e-9) << name;
    EXPECT_NEAR(work[name + " forward + backward bfloat16"] / (forward + backward), 1, 1e-9) << name;
  };
  const double bytes = 64 * 64 * 2, pairs = 64 * 65 / 2.0;  // of x; queries with keys
  expect_work("cema 64", 2 * bytes, 3 * bytes);
  expect_work("timestep_norm 64", 2 * bytes, 3 * bytes);
  expect_work("attention 256/2048 chunk 2048", 2 * 2 * pairs * (256 + 2048), 4 * 2 * pairs * (256 + 2048));
}

// A limit on file sizes stands for a full disk: the write fails part of the way.
TEST(Run, KeepsTheOldCheckpointWhenTheDiskIsFull) {
  const TemporaryFolder f;
  const auto config = small_config(f);
  ASSERT_EQ(run(f, {"train", config}).exit_code, 0);
  const auto before = read_file(f / "run/checkpoints/step-12/model.safetensors");
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit small{20000, limit.rlim_max};
  // The same run, longer: its first checkpoint does not fit.
  fs::remove(f / "run/config.toml");
  setrlimit(RLIMIT_FSIZE, &small);
  const auto outcome = run(f, {"train", config, "--resume", "--set", "train.steps=15"});
  setrlimit(RLIMIT_FSIZE, &limit);
  EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "error: "));
  EXPECT_EQ(read_file(f / "run/checkpoints/step-12/model.safetensors"), before);
  EXPECT_FALSE(fs::exists(f / "run/checkpoints/step-15"));
  EXPECT_EQ(run(f, {"info", (f / "run").string()}).exit_code, 0);
}

}  // namespace
}  // namespace megalodon::testing
