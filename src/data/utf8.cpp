#include "data/utf8.h"

#include <cstring>

namespace megalodon::data {
namespace {

// Length of the ASCII run at `position`, eight bytes at a time.
std::size_t ascii_run(std::string_view text, std::size_t position) {
  const std::size_t begin = position;
  while (position + 8 <= text.size()) {
    std::uint64_t word;
    std::memcpy(&word, text.data() + position, 8);
    if (word & 0x8080808080808080u) break;
    position += 8;
  }
  while (position < text.size() && static_cast<unsigned char>(text[position]) < 0x80) ++position;
  return position - begin;
}

}  // namespace

Utf8Step utf8_step(std::string_view text, std::size_t position) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[position + i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return {Utf8Step::Kind::character, first, 1};
  if (first < 0xC2 || first > 0xF4) return {Utf8Step::Kind::invalid, 0, 1};
  const std::size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  // The second byte's range shuts out overlong forms, surrogates and code points beyond U+10FFFF.
  unsigned char low = 0x80, high = 0xBF;
  if (first == 0xE0) low = 0xA0;
  if (first == 0xED) high = 0x9F;
  if (first == 0xF0) low = 0x90;
  if (first == 0xF4) high = 0x8F;
  char32_t code_point = first & (0x7Fu >> length);
  for (std::size_t i = 1; i < length; ++i, low = 0x80, high = 0xBF) {
    if (position + i == text.size()) return {Utf8Step::Kind::incomplete, 0, i};
    if (byte(i) < low || byte(i) > high) return {Utf8Step::Kind::invalid, 0, i};
    code_point = code_point << 6 | (byte(i) & 0x3Fu);
  }
  return {Utf8Step::Kind::character, code_point, length};
}

void append_utf8(char32_t code_point, std::string& out) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

std::size_t utf8_complete_prefix(std::string_view text) {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const std::size_t position = text.size() - back;
    if ((static_cast<unsigned char>(text[position]) & 0xC0) == 0x80) continue;
    return utf8_step(text, position).kind == Utf8Step::Kind::incomplete ? position : text.size();
  }
  return text.size();
}

std::size_t utf8_first_invalid(std::string_view text) {
  for (std::size_t position = 0;;) {
    position += ascii_run(text, position);
    if (position == text.size()) return std::string_view::npos;
    const Utf8Step step = utf8_step(text, position);
    if (step.kind != Utf8Step::Kind::character) return position;
    position += step.length;
  }
}

std::string utf8_repaired(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t plain = ascii_run(text, position);
    out.append(text, position, plain);
    position += plain;
    if (position == text.size()) break;
    const Utf8Step step = utf8_step(text, position);
    if (step.kind == Utf8Step::Kind::character) {
      out.append(text, position, step.length);
    } else {
      out += kReplacement;
    }
    position += step.length;
  }
  return out;
}

}  // namespace megalodon::data
