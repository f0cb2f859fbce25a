#include "train/checkpoint.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "base/testing.h"

namespace megalodon::train {
namespace {
namespace fs = std::filesystem;

void save(const CheckpointFolder& folder, int64_t step, const std::string& content) {
  folder.save(step, [&](const fs::path& to) {
    write_file_atomically(to / "a.txt", content);
    write_file_atomically(to / "b.txt", "b");
  });
}

int64_t latest_step(const CheckpointFolder& folder) {
  const auto found = folder.latest();
  return found ? found->step : -1;
}

TEST(Checkpoint, KeepsTheNewest) {
  const testing::TemporaryFolder root;
  const CheckpointFolder folder(root / "checkpoints", 2);
  EXPECT_FALSE(folder.latest());
  for (const int64_t step : {5, 10, 100}) save(folder, step, "content");
  EXPECT_FALSE(fs::exists(root / "checkpoints" / "step-5"));
  EXPECT_TRUE(fs::exists(root / "checkpoints" / "step-10"));
  EXPECT_EQ(latest_step(folder), 100);
}

TEST(Checkpoint, PassesOverDamagedOnes) {
  const testing::TemporaryFolder root;
  const CheckpointFolder folder(root / "checkpoints", 9);
  save(folder, 1, "first");
  const auto second = root / "checkpoints" / "step-2";
  const auto expect_passed_over = [&](const std::string& why) {
    EXPECT_NE(damage_of(second).find(why), std::string::npos) << damage_of(second);
    EXPECT_EQ(latest_step(folder), 1);
    save(folder, 2, "second");
    EXPECT_EQ(latest_step(folder), 2);
  };
  save(folder, 2, "second");
  fs::resize_file(second / "a.txt", 3);
  expect_passed_over("another size");
  std::ofstream(second / "a.txt") << "secone";
  expect_passed_over("another hash");
  fs::remove(second / "b.txt");
  expect_passed_over("missing");
  fs::resize_file(second / "manifest.json", 10);
  expect_passed_over("manifest.json");
  fs::remove(second / "manifest.json");
  expect_passed_over("manifest.json");
}

TEST(Checkpoint, AFailedOneLeavesTheOldAlone) {
  const testing::TemporaryFolder root;
  const CheckpointFolder folder(root / "checkpoints", 1);
  save(folder, 1, "first");
  EXPECT_THROW(folder.save(2, [](const fs::path&) { throw std::runtime_error("no space left on device"); }),
               Error);
  EXPECT_EQ(latest_step(folder), 1);
  std::size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(root / "checkpoints")) ++entries;
  EXPECT_EQ(entries, 1u);
}

}  // namespace
}  // namespace megalodon::train
