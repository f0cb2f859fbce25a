#include <csignal>
#include <map>
#include <random>

#include "base/hash.h"
#include "base/json.h"
#include "program.h"

// A run that is killed and resumed equals one that was not, to the bit.
namespace megalodon::testing {
namespace {
namespace fs = std::filesystem;

// What must be equal: the loss, gradient norm and validation figures of every step, and the last checkpoint's
// weights and moments.
std::map<std::string, std::string> result_of(const fs::path& run) {
  std::map<std::string, std::string> result;
  const auto text = read_file(run / "metrics.jsonl");
  for (std::size_t begin = 0; begin < text.size();) {
    const auto end = text.find('\n', begin);
    const auto line = Json::parse(text.substr(begin, end - begin));
    begin = end + 1;
    const auto kind = line["kind"].get<std::string>();
    if (kind != "step" && kind != "validation") continue;
    const auto key = kind + " " + line["step"].dump();
    EXPECT_FALSE(result.contains(key)) << key << " is there twice";
    result[key] = line["loss"].dump() + (kind == "step" ? " " + line["gradient_norm"].dump() : "");
  }
  for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
    result[file] = hex(xxh3_of_file(run / "checkpoints" / "step-12" / file));
  }
  return result;
}

void finish(const TemporaryFolder& folder, const std::string& config) {
  const auto outcome = run(folder, {"train", config, "--resume"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
}

class Resume : public ::testing::TestWithParam<const char*> {};

TEST_P(Resume, AfterSigkillAtRandomMomentsEqualsTheUninterruptedRun) {
  const TemporaryFolder whole;
  const auto started = std::chrono::steady_clock::now();
  finish(whole, small_config(whole, "", GetParam()));
  auto duration = std::chrono::steady_clock::now() - started;
  const auto expected = result_of(whole / "run");
  ASSERT_EQ(expected.size(), 12u + 3u + 2u);
  std::mt19937 random(7);
  int killed = 0;
  for (int trial = 0; trial < 10; ++trial) {
    const TemporaryFolder folder;
    const auto config = small_config(folder, "", GetParam());
    for (int kills = 0; kills < 2; ++kills) {  // the second one may hit the resumed run
      Program program(folder, {"train", config, "--resume"});
      std::this_thread::sleep_for(duration * std::uniform_real_distribution<double>(0.05, 1.0)(random));
      if (program.running())
        ++killed;
      else  // this run was faster than the one that was measured
        duration = duration * 2 / 3;
      program.signal(SIGKILL);
      program.wait();
    }
    finish(folder, config);
    EXPECT_EQ(result_of(folder / "run"), expected) << "trial " << trial;
  }
  EXPECT_GE(killed, 5);  // or the test shows nothing
}

INSTANTIATE_TEST_SUITE_P(Models, Resume, ::testing::Values("megalodon", "llama"));

TEST(Interrupt, SavesACheckpointAndGoesOn) {
  const TemporaryFolder whole, folder;
  finish(whole, small_config(whole));
  const auto config = small_config(folder);
  Program program(folder, {"train", config});
  while (program.running() && !fs::exists(folder / "run/checkpoints/step-3")) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  program.signal(SIGINT);
  const auto outcome = program.wait();
  EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "--resume"));
  finish(folder, config);
  EXPECT_EQ(result_of(folder / "run"), result_of(whole / "run"));
}

TEST(Resume, PassesOverATornCheckpointAndSaysSo) {
  const TemporaryFolder whole, folder;
  finish(whole, small_config(whole));
  const auto config = small_config(folder);
  finish(folder, config);
  const auto last = folder / "run/checkpoints/step-12";
  fs::resize_file(last / "model.safetensors", fs::file_size(last / "model.safetensors") - 1);
  const auto outcome = run(folder, {"train", config, "--resume"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_TRUE(contains(outcome.err, "step-12 is damaged"));
  EXPECT_EQ(result_of(folder / "run"), result_of(whole / "run"));
}

}  // namespace
}  // namespace megalodon::testing
