#include "report/tensorboard.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <set>

#include "base/file.h"
#include "base/hash.h"
#include "base/testing.h"

namespace megalodon::report {
namespace {

using megalodon::testing::contains;
using megalodon::testing::TemporaryFolder;

// The payloads of an event file's records; checks lengths and checksums.
std::vector<std::string> records_of(const std::filesystem::path& path) {
  const std::string file = read_file(path);
  const auto masked = [](std::string_view text) {
    return std::rotr(crc32c(std::as_bytes(std::span(text.data(), text.size()))), 15) + 0xa282ead8u;
  };
  const auto word = [&](std::size_t at) {
    std::uint32_t value = 0;
    std::memcpy(&value, file.data() + at, 4);
    return value;
  };
  std::vector<std::string> payloads;
  for (std::size_t at = 0; at < file.size();) {
    std::uint64_t length = 0;
    std::memcpy(&length, file.data() + at, 8);
    EXPECT_EQ(word(at + 8), masked(std::string_view(file).substr(at, 8)));
    payloads.push_back(file.substr(at + 12, length));
    EXPECT_EQ(word(at + 12 + length), masked(payloads.back()));
    at += 16 + length;
  }
  return payloads;
}

TEST(EventWriter, WritesRecordsThatAreCompleteAtOnce) {
  TemporaryFolder folder;
  EventWriter writer(folder / "tb");
  EXPECT_EQ(records_of(writer.path()).size(), 1u);
  writer.add_scalar("loss", 0.5, 300, 1.0);
  const std::vector<std::string> records = records_of(writer.path());
  ASSERT_EQ(records.size(), 2u);
  EXPECT_TRUE(contains(records[0], "brain.Event:2"));
  // wall_time 1.0, step 300, summary { value { tag "loss", simple_value 0.5 } }
  const std::string expected("\x09\0\0\0\0\0\0\xf0\x3f\x10\xac\x02\x2a\x0d\x0a\x0b\x0a\x04loss\x15\0\0\0\x3f",
                             27);
  EXPECT_EQ(records[1], expected);
}

TEST(EventWriter, NamesEveryFileBehindTheOnesBefore) {
  TemporaryFolder folder;
  megalodon::testing::write_text(folder / "events.out.tfevents.9000000000.megalodon.000",
                                 "");  // from the future
  std::set<std::string> names;
  std::string last = "events.out.tfevents.9000000000.megalodon.000";
  for (int i = 0; i < 12; ++i) {
    const std::string name = EventWriter(folder.path()).path().filename().string();
    EXPECT_GT(name, last);
    last = name;
  }
}

TEST(EventWriter, SaysWhyItCannotWrite) {
  TemporaryFolder folder;
  megalodon::testing::write_text(folder / "file", "");
  EXPECT_TRUE(contains(megalodon::testing::work_error([&] { EventWriter writer(folder / "file"); }), "file"));
}

}  // namespace
}  // namespace megalodon::report
