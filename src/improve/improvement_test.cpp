#include "improve/improvement.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "base/file.h"
#include "base/hash.h"
#include "improve/metrics.h"
#include "improve/testing.h"

namespace megalodon::improve {
namespace {
namespace fs = std::filesystem;
using megalodon::testing::contains;
using megalodon::testing::TemporaryFolder;
using testing::SmallRun;

struct Counter : Listener {
  std::vector<std::string> events;
  void on_labels(int64_t round, int64_t, const LabelReport& r) override {
    events.push_back("labels " + std::to_string(round) + " " + std::to_string(r.kept));
  }
  void on_round(int64_t round, int64_t, const std::string&, const std::map<std::string, double>&) override {
    events.push_back("round " + std::to_string(round));
  }
};

void improve(SmallRun& run, const Improvement::Truth& truth = {}, Listener* listener = nullptr) {
  Improvement improvement(
      run.config, *run.models, *run.tokenizer,
      truth ? truth : [&](const std::string& p) { return run.config.task->solve(p); });
  const auto step = improvement.resume();
  MetricsFile metrics(run.config.run / "metrics.jsonl", step);
  std::vector<Listener*> listeners{&metrics};
  if (listener != nullptr) listeners.push_back(listener);
  ASSERT_TRUE(improvement.run(listeners));
}

// Every file of a run that must not depend on time, by its path; labels.json tells of true answers.
std::map<std::string, std::string> files_of(const fs::path& run) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(run)) {
    const auto name = fs::relative(entry.path(), run).string();
    if (!entry.is_regular_file() || name.ends_with("times.jsonl") || name.ends_with("labels.json")) continue;
    if (name == "metrics.jsonl") continue;  // with seconds
    files[name] = hex(xxh3_of_file(entry.path()));
  }
  return files;
}

TEST(Improvement, LeavesItsRoundsInFilesForPeople) {
  const TemporaryFolder folder;
  SmallRun run(folder.path());
  Counter counter;
  improve(run, {}, &counter);
  EXPECT_EQ(counter.events,
            (std::vector<std::string>{"round 0", "labels 1 40", "round 1", "labels 2 40", "round 2"}));
  EXPECT_EQ(read_lines(folder / "rounds/1/answers.jsonl").size(), 40u);
  EXPECT_EQ(read_lines(folder / "rounds/1/data.jsonl").size(), 40u);
  EXPECT_EQ(read_lines(folder / "rounds/2/evaluation.jsonl").size(), 2u + 2 + 1);  // base, rounds, beyond
  EXPECT_TRUE(fs::exists(folder / "rounds/2/model/model-2/model.safetensors"));
  EXPECT_TRUE(fs::exists(folder / "checkpoints/step-16/model-1/config.json"));
  const auto row = parse_json(read_lines(folder / "rounds/1/data.jsonl")[0], "row");
  EXPECT_EQ(row["difficulty"], "3");
  EXPECT_EQ(row["prompt"].get<std::string>().size(), 4u);
}

// Filters, training and evaluation never look at the true answers of self-made problems.
TEST(Improvement, PoisonedTruthChangesTheReportedLabelsAlone) {
  const TemporaryFolder honest, poisoned;
  const std::string improve_keys = "models = 2\nfilters = [\"vote\", \"length\", \"confidence\"]\n";
  const std::string sections = "[vote]\nshare = 0.5\n[length]\nslack = 3\n[confidence]\nshare = 0.75\n";
  SmallRun a(honest.path(), improve_keys, sections), b(poisoned.path(), improve_keys, sections);
  improve(a);
  improve(b, [](const std::string&) { return "poison"; });
  EXPECT_EQ(files_of(honest.path()), files_of(poisoned.path()));
  EXPECT_GT(files_of(honest.path()).size(), 20u);
  const auto labels = [](const TemporaryFolder& folder) {
    return RoundFiles(folder.path(), 1, tasks::find_task("reverse")).labels();
  };
  EXPECT_EQ(labels(poisoned).kept, labels(honest).kept);
  EXPECT_EQ(labels(poisoned).accuracy_before, 0);
}

TEST(Improvement, GoesOnWhereItWas) {
  const TemporaryFolder whole, stopped;
  const std::string all_kept = "keep = 100\n";
  SmallRun a(whole.path(), "models = 2\n", all_kept);
  improve(a);
  SmallRun b(stopped.path(), "models = 2\n", all_kept);
  improve(b);
  // As a kill leaves it: the checkpoint of round 1's end is the newest, half of round 2's answers are there,
  // the last of them torn, and half of round 1's evaluation.
  const auto cut_in_half = [&](const std::string& file) {
    const auto text = read_file(whole / file);
    megalodon::testing::write_text(stopped / file, text.substr(0, text.size() / 2));
  };
  for (const char* lost : {"checkpoints/step-16", "checkpoints/step-14", "checkpoints/step-12", "rounds/2"})
    fs::remove_all(stopped / lost);
  fs::create_directories(stopped / "rounds/2");
  fs::copy_file(whole / "rounds/2/plan.json", stopped / "rounds/2/plan.json");
  cut_in_half("rounds/2/answers.jsonl");
  cut_in_half("rounds/1/evaluation.jsonl");
  SmallRun c(stopped.path(), "models = 2\n", all_kept);
  improve(c);
  EXPECT_EQ(files_of(whole.path()), files_of(stopped.path()));
}

TEST(Improvement, NeedsTheDataOfTheRoundThatItStandsIn) {
  const TemporaryFolder folder;
  SmallRun run(folder.path());
  improve(run);
  fs::remove(folder / "rounds/1/data.jsonl");
  SmallRun again(folder.path());
  EXPECT_TRUE(
      contains(megalodon::testing::request_error([&] { improve(again); }), "data of the round is missing"));
}

TEST(Improvement, AcceleratedRoundsTakeWhatIsAlreadySolved) {
  const TemporaryFolder folder;
  SmallRun run(folder.path(), "models = 1\naccelerated = true\n", "[probe]\nproblems = 4\naccuracy = 0\n",
               "name = \"maze\"\nbase = 26\n");
  improve(run);
  const auto plan = RoundFiles(folder.path(), 1, *run.config.task).plan();
  ASSERT_EQ(plan.difficulties.size(), 3u);  // an accuracy of 0 is always reached: up to the hardest, 29 hops
  EXPECT_EQ(plan.reach, 3);
  EXPECT_EQ(read_lines(folder / "rounds/1/probe.jsonl").size(), 3u);
  EXPECT_EQ(read_lines(folder / "rounds/1/data.jsonl").size(), 20u);  // the size of the set stays
}

TEST(Improvement, AcceleratedRoundsTakeOneDifficultyAtLeast) {
  const TemporaryFolder folder;
  SmallRun run(folder.path(), "models = 1\naccelerated = true\n", "[probe]\nproblems = 4\naccuracy = 1\n");
  improve(run);
  const auto plan = RoundFiles(folder.path(), 1, *run.config.task).plan();
  ASSERT_EQ(plan.difficulties.size(), 1u);
  EXPECT_EQ(run.config.task->text(plan.difficulties[0]), "3");
}

TEST(Improvement, GoesOnWithoutDataThatTheFiltersDropped) {
  const std::string keys = "models = 1\nfilters = [\"confidence\"]\n", none = "[confidence]\nshare = 0\n";
  const TemporaryFolder folder, stopping;
  SmallRun run(folder.path(), keys, none);
  Counter counter;
  improve(run, {}, &counter);
  EXPECT_EQ(counter.events[1], "labels 1 0");
  EXPECT_EQ(counter.events.back(), "round 2");
  SmallRun strict(stopping.path(), keys + "when_empty = \"stop\"\n", none);
  const auto message = megalodon::testing::work_error([&] { improve(strict); });
  EXPECT_TRUE(contains(message, "the filters dropped all 20 answers"));
}

TEST(Improvement, TeachesMegalodonToo) {
  const TemporaryFolder folder;
  SmallRun run(folder.path(), "models = 1\n", "", "name = \"reverse_add\"\nbase = 2\n", "megalodon");
  Counter counter;
  improve(run, {}, &counter);
  EXPECT_EQ(counter.events.back(), "round 2");
}

TEST(Evaluation, CountsWholeAnswersAndShowsWhereOnesGoWrong) {
  const TemporaryFolder folder;
  SmallRun run(folder.path());
  Solver solver(*run.models, *run.tokenizer, *run.config.task, 8);
  const auto result = evaluate(solver, *run.config.task, run.config.task->difficulty("12"), 9, 3);
  EXPECT_EQ(result.accuracy, (std::vector<double>{0, 0}));  // nothing is learnt yet
  ASSERT_FALSE(result.wrong.empty());
  const auto& w = result.wrong[0];
  EXPECT_EQ(w.target, run.config.task->solve(w.prompt));
  const auto at = static_cast<std::size_t>(w.first_wrong);
  EXPECT_EQ(w.answer.substr(0, at), w.target.substr(0, at));
  EXPECT_TRUE(at == w.answer.size() || at == w.target.size() || w.answer[at] != w.target[at]);
  EXPECT_TRUE(result.separable);
  EXPECT_FALSE(evaluate(solver, *run.config.task, run.config.task->difficulty("1"), 2, 3).separable);
  const auto again = evaluation_from_json(to_json(result), "here");
  EXPECT_EQ(dump_json(to_json(again)), dump_json(to_json(result)));
}

TEST(Solver, ShowsTokensThatTheTokenizerDoesNotHave) {
  const TemporaryFolder folder;
  SmallRun run(folder.path(), "models = 1\n", "", "name = \"reverse\"\nbase = 2\n", "llama",
               "vocab_size = 500\n");
  Solver solver(*run.models, *run.tokenizer, *run.config.task, 8);
  const std::vector<std::string> prompts{"12=", "21="};
  std::string text;  // of a model that knows nothing: any of the 500
  for (const auto& replies : solver.solve(prompts, run.config.task->difficulty("2"))) text += replies[0].text;
  EXPECT_TRUE(contains(text, "?"));
  improve(run);
}

TEST(Config, RefusesWhatCannotWork) {
  const TemporaryFolder folder;
  const auto refused = [&](const std::string& improve_keys, const std::string& sections = "",
                           const std::string& task = "name = \"reverse\"\nbase = 2\n") {
    return megalodon::testing::request_error(
        [&] { SmallRun run(folder.path(), improve_keys, sections, task); });
  };
  EXPECT_TRUE(contains(refused("filters = [\"vote\"]\n"), "a vote of one model"));
  EXPECT_TRUE(contains(refused("filters = [\"votes\"]\n"), "did you mean 'vote'?"));
  EXPECT_TRUE(contains(refused("filters = [\"verifier\"]\n"), "is for mazes"));
  EXPECT_TRUE(contains(refused("", "", "name = \"revers\"\nbase = 2\n"), "unknown task 'revers'"));
  EXPECT_TRUE(contains(refused("", "", "name = \"reverse\"\nbase = 2000\n"), "task.base"));
  EXPECT_TRUE(contains(refused("", "", "name = \"reverse\"\nbase = 999\n"), "improve.rounds"));
  EXPECT_TRUE(contains(refused("", "[vote]\nshare = 0.5\n"), "vote"));  // a section that nothing asks for
}

}  // namespace
}  // namespace megalodon::improve
