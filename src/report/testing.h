#pragma once
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::report::testing {

// What is wrong with an XML document or fragment, or "": tags that balance, attributes quoted and named once,
// references known, no control characters. A <!DOCTYPE> is passed over.
inline std::string xml_fault(std::string_view text) {
  std::vector<std::string> open;
  const auto bad_content = [](std::string_view content) -> std::string {
    for (std::size_t i = 0; i < content.size(); ++i) {
      const auto c = static_cast<unsigned char>(content[i]);
      if (c == '<') return "a bare <";
      if (c < ' ' && c != '\n' && c != '\t') return "a control character";
      if (c != '&') continue;
      bool known = false;
      for (const std::string_view name : {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"}) {
        known = known || content.substr(i).starts_with(name);
      }
      if (!known) return "an unknown reference";
    }
    return "";
  };
  while (!text.empty()) {
    const std::size_t begin = text.find('<');
    if (const std::string fault = bad_content(text.substr(0, begin)); !fault.empty()) return fault;
    if (begin == std::string_view::npos) break;
    const std::size_t end = text.find('>', begin);
    if (end == std::string_view::npos) return "a tag without end";
    std::string_view tag = text.substr(begin + 1, end - begin - 1);
    text.remove_prefix(end + 1);
    if (tag.starts_with("!DOCTYPE")) continue;
    if (tag.starts_with('/')) {
      if (open.empty() || open.back() != tag.substr(1))
        return "</" + std::string(tag.substr(1)) + "> out of place";
      open.pop_back();
      continue;
    }
    const bool closed = tag.ends_with('/');
    if (closed) tag.remove_suffix(1);
    const std::string name(tag.substr(0, tag.find(' ')));
    tag.remove_prefix(name.size());
    std::vector<std::string> attributes;
    while (!tag.empty()) {
      const std::size_t equals = tag.find("=\"");
      const std::size_t quote = equals == std::string_view::npos ? equals : tag.find('"', equals + 2);
      if (tag[0] != ' ' || quote == std::string_view::npos) return "a malformed attribute in <" + name + ">";
      const std::string attribute(tag.substr(1, equals - 1));
      if (std::find(attributes.begin(), attributes.end(), attribute) != attributes.end()) {
        return "an attribute named twice";
      }
      attributes.push_back(attribute);
      const std::string fault = bad_content(tag.substr(equals + 2, quote - equals - 2));
      if (!fault.empty()) return fault + " in an attribute";
      tag.remove_prefix(quote + 1);
    }
    if (!closed) open.push_back(name);
  }
  return open.empty() ? "" : "<" + open.back() + "> is not closed";
}

inline std::size_t count_of(std::string_view text, std::string_view part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

}  // namespace megalodon::report::testing
