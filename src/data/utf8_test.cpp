#include "data/utf8.h"

#include "data/testing.h"

namespace megalodon::data {
namespace {

using Kind = Utf8Step::Kind;

TEST(Utf8, EveryCodePointRoundTrips) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    std::string text;
    append_utf8(c, text);
    const Utf8Step step = utf8_step(text, 0);
    if (c >= 0xD800 && c < 0xE000) {  // surrogates are no characters
      ASSERT_EQ(step.kind, Kind::invalid);
      continue;
    }
    ASSERT_EQ(step.kind, Kind::character) << static_cast<std::uint32_t>(c);
    ASSERT_EQ(step.code_point, c);
    ASSERT_EQ(step.length, text.size());
    ASSERT_EQ(utf8_complete_prefix(text), text.size());
    for (std::size_t cut = 1; cut < text.size(); ++cut) {
      const std::string_view part = std::string_view(text).substr(0, cut);
      ASSERT_EQ(utf8_step(part, 0).kind, Kind::incomplete);
      ASSERT_EQ(utf8_complete_prefix(part), 0u);
    }
  }
}

TEST(Utf8, ReplacesMaximalSubparts) {
  // The Unicode Standard, table 3-8 and the examples around it.
  const auto marks = [](int n) {
    std::string text;
    for (int i = 0; i < n; ++i) text += kReplacement;
    return text;
  };
  EXPECT_EQ(utf8_repaired("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), marks(8) + "A");
  EXPECT_EQ(utf8_repaired("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), marks(8) + "A");
  EXPECT_EQ(utf8_repaired("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), marks(5) + "A" + marks(2) + "B");
  EXPECT_EQ(utf8_repaired("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), marks(4) + "A");
  EXPECT_EQ(utf8_repaired("plain text, longer than eight"), "plain text, longer than eight");
}

TEST(Utf8, FindsTheFirstInvalidByte) {
  std::mt19937_64 random(1);
  const std::string text = random_text(random, 200);
  EXPECT_EQ(utf8_first_invalid(text), std::string::npos);
  for (std::size_t at = 0; at < text.size(); ++at) {
    std::string broken = text;
    broken[at] = '\xFF';
    // The break is seen where the character that it is in begins.
    std::size_t begin = at;
    while ((static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    ASSERT_EQ(utf8_first_invalid(broken), begin);
  }
}

}  // namespace
}  // namespace megalodon::data
