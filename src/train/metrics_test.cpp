#include "train/metrics.h"

#include <gtest/gtest.h>

#include "base/testing.h"

namespace megalodon::train {
namespace {

TEST(MetricsFile, DropsWhatWasLostAndWhatWasTorn) {
  const testing::TemporaryFolder folder;
  const auto path = folder / "metrics.jsonl";
  {
    MetricsFile file(path, 0);
    file.on_start({{"kind", "start"}, {"step", 0}});
    for (int64_t step = 1; step <= 4; ++step)
      file.on_step({step, step * 10, 2.5, 1e-3, 0.5, 1.0, 10.0, step == 3});
    file.on_validation({4, 40, 2.0, 7.4, 2.9, 1.0});
  }
  const auto whole = read_file(path);
  testing::write_text(path, whole + "{\"kind\":\"step\",\"st");
  MetricsFile resumed(path, 3);
  const auto text = read_file(path);
  EXPECT_EQ(text, whole.substr(0, text.size()));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4);
  EXPECT_NE(text.find("\"skipped\":true"), std::string::npos);
}

}  // namespace
}  // namespace megalodon::train
