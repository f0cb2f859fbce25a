#pragma once
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/testing.h"

// What the tests of src/data share.
namespace megalodon::data {

// A folder of one test, removed at its end.
class TestFolder : public testing::TemporaryFolder {
 public:
  std::filesystem::path write(const std::string& name, std::string_view text) const {
    std::filesystem::create_directories((*this / name).parent_path());
    testing::write_text(*this / name, text);
    return *this / name;
  }
};

#define EXPECT_ERROR(statement, part) \
  EXPECT_TRUE(::megalodon::testing::contains(::megalodon::testing::request_error([&] { statement; }), part))

// Text of words, lines, and characters of every UTF-8 length.
inline std::string random_text(std::mt19937_64& random, std::size_t words) {
  static const std::vector<std::string> syllables{
      "na", "ti",  "on",       "the", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\xA6\x88",
      "qu", "ber", "\xD0\xB6", "xyz"};
  std::string text;
  for (std::size_t i = 0; i < words; ++i) {
    for (std::size_t n = random() % 4 + 1; n > 0; --n) text += syllables[random() % syllables.size()];
    text += random() % 8 == 0 ? "\n" : random() % 16 == 0 ? "  " : " ";
  }
  return text;
}

}  // namespace megalodon::data
