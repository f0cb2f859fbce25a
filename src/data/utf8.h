#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace megalodon::data {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD in UTF-8

// One step of a UTF-8 decoder (The Unicode Standard, table 3-7).
struct Utf8Step {
  enum class Kind {
    character,   // `code_point` is set
    invalid,     // the `length` bytes are no character and no beginning of one (a maximal subpart, >= 1 byte)
    incomplete,  // the text ends within a character that is well-formed so far
  };
  Kind kind;
  char32_t code_point;
  std::size_t length;
};

// The step at `position` < text.size().
Utf8Step utf8_step(std::string_view text, std::size_t position);

void append_utf8(char32_t code_point, std::string& out);

// Length of the longest prefix that does not end within a character; text.size() less 0 to 3.
std::size_t utf8_complete_prefix(std::string_view text);

// The byte where `text` first is not UTF-8 (an incomplete end counts), or npos.
std::size_t utf8_first_invalid(std::string_view text);

// `text` with each maximal subpart that is not UTF-8 replaced by U+FFFD.
std::string utf8_repaired(std::string_view text);

}  // namespace megalodon::data
