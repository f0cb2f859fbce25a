#include "base/hash.h"

#include <numeric>
#include <vector>

#include "base/testing.h"

namespace megalodon {
namespace {

std::uint32_t crc32c_of(std::string_view text) {
  return crc32c(std::as_bytes(std::span(text)));
}

// RFC 3720, B.4, and the common check value.
TEST(Crc32c, KnownValues) {
  EXPECT_EQ(crc32c_of("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c_of(""), 0u);
  EXPECT_EQ(crc32c_of(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(crc32c_of(std::string(32, '\xff')), 0x62A8AB43u);
  std::string ascending(32, '\0');
  std::iota(ascending.begin(), ascending.end(), '\0');
  EXPECT_EQ(crc32c_of(ascending), 0x46DD794Eu);
}

TEST(Xxh3, KnownValues) {
  EXPECT_EQ(xxh3(""), 0x2d06800538d394c2u);  // the value of xxHash's own documentation
  EXPECT_NE(xxh3("a"), xxh3("b"));
}

TEST(Xxh3, OfAFileIsThatOfItsBytes) {
  const testing::TemporaryFolder folder;
  const std::string text(100'000, 'x');
  testing::write_text(folder / "file", text);
  EXPECT_EQ(xxh3_of_file(folder / "file"), xxh3(text));
}

TEST(Hex, SixteenDigits) {
  EXPECT_EQ(hex(0), "0000000000000000");
  EXPECT_EQ(hex(0x0123456789abcdefu), "0123456789abcdef");
}

}  // namespace
}  // namespace megalodon
