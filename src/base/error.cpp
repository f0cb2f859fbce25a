#include "base/error.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace megalodon {
namespace {
std::string message(std::string_view what, std::string_view where, std::string_view what_to_do) {
  std::string text(what);
  if (!where.empty()) text.append(" (").append(where).append(")");
  if (!what_to_do.empty()) text.append(": ").append(what_to_do);
  return one_line(text);
}
}  // namespace

std::string one_line(std::string_view text) {
  std::string line(text);
  for (char& c : line) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '\n' || c == '\r' || c == '\t') {
      c = ' ';
    } else if (code < 0x20 || code == 0x7f) {
      c = '?';
    }
  }
  return line;
}

std::string excerpt(std::string_view text) {
  constexpr std::size_t kMost = 60;
  if (text.size() <= kMost) return one_line(text);
  std::size_t end = kMost - 3;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;  // not inside a character
  return one_line(text.substr(0, end)) + "...";
}

Error::Error(Kind kind, std::string_view what, std::string_view where, std::string_view what_to_do)
    : std::runtime_error(message(what, where, what_to_do)), kind_(kind) {}

void fail_request(std::string_view what, std::string_view where, std::string_view what_to_do) {
  throw Error(Error::Kind::request, what, where, what_to_do);
}

void fail_work(std::string_view what, std::string_view where, std::string_view what_to_do) {
  throw Error(Error::Kind::work, what, where, what_to_do);
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j] + 1, row[j + 1] + 1, substituted});
    }
  }
  return row.back();
}

}  // namespace megalodon
