#include "base/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <sstream>

// toml++ asserts, and in release builds assumes, things that malformed text makes false: neither here.
#undef NDEBUG
#define TOML_ASSERT(x) static_cast<void>(0)
#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include "base/error.h"
#include "base/file.h"

namespace megalodon {
namespace {

constexpr int deepest = 32;

// Follows the strings, comments, brackets and dotted keys of a TOML text.
class DepthScanner {
 public:
  explicit DepthScanner(std::string_view text) : text_(text) {}

  // The line at which brackets or dotted keys nest deeper than allowed, or 0. The parser bounds brackets
  // alone, and the destructor of its tables recurses.
  std::size_t too_deep() {
    int brackets = 0, dots = 0;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '"' || c == '\'') {
        skip_string(c);
        continue;
      }
      if (c == '#') {
        at_ = std::min(text_.find('\n', at_), text_.size());
        continue;
      }
      if (c == '\n') ++line_;
      if (c == '[' || c == '{') ++brackets;
      if ((c == ']' || c == '}') && brackets > 0) --brackets;
      if (c == '.') ++dots;
      if (c == '\n' || c == '=' || c == ',' || c == '[' || c == '{') dots = 0;
      if (brackets > deepest || dots >= deepest) return line_;
      ++at_;
    }
    return 0;
  }

 private:
  void skip_string(char quote) {
    const std::string triple(3, quote);
    const bool multiline = text_.substr(at_, 3) == triple;
    at_ += multiline ? 3 : 1;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\\' && quote == '"' && at_ + 1 < text_.size() && text_[at_ + 1] != '\n') {
        at_ += 2;
      } else if (multiline && text_.substr(at_, 3) == triple) {
        at_ += 3;
        // Up to two quotes of the content stand before the closing three.
        for (int i = 0; i < 2 && at_ < text_.size() && text_[at_] == quote; ++i) ++at_;
        return;
      } else if (!multiline && (c == quote || c == '\n')) {
        if (c == quote) ++at_;
        return;
      } else {
        if (c == '\n') ++line_;
        ++at_;
      }
    }
  }

  std::string_view text_;
  std::size_t at_ = 0, line_ = 1;
};

toml::table parse_toml(std::string_view text, std::string_view name) {
  if (const std::size_t line = DepthScanner(text).too_deep()) {
    fail_request("malformed TOML", std::string(name) + ":" + std::to_string(line),
                 "nested deeper than " + std::to_string(deepest));
  }
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& error) {
    fail_request("malformed TOML", std::string(name) + ":" + std::to_string(error.source().begin.line),
                 error.description().substr(0, 160));
  }
}

std::string quote(std::string_view text) {
  std::string literal = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      (literal += '\\') += c;
    } else if (c == '\n') {
      literal += "\\n";
    } else if (code < 0x20 || code == 0x7f) {
      (literal += "\\u00") += {"0123456789abcdef"[code >> 4], "0123456789abcdef"[code & 15]};
    } else {
      literal += c;
    }
  }
  return literal += '"';
}

std::string literal(std::int64_t value) {
  return std::to_string(value);
}

std::string literal(bool value) {
  return value ? "true" : "false";
}

std::string literal(std::string_view value) {
  return quote(value);
}

// The shortest text that reads back as the same double.
std::string literal(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  std::string text(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
  return text.find_first_of(".e") == text.npos ? text + ".0" : text;
}

template <class T>
std::string literal(const std::vector<T>& values) {
  std::string text = "[";
  for (const auto& value : values) {
    if (text.size() > 1) text += ", ";
    text += literal(value);
  }
  return text += ']';
}

std::string literal(const toml::node& node) {
  if (const auto* value = node.as_integer()) return literal(value->get());
  if (const auto* value = node.as_floating_point()) return literal(value->get());
  if (const auto* value = node.as_boolean()) return literal(value->get());
  if (const auto* value = node.as_string()) return quote(value->get());
  std::string text;
  if (const auto* array = node.as_array()) {
    for (const auto& item : *array) text += (text.empty() ? "" : ", ") + literal(item);
    return "[" + text + "]";
  }
  if (const auto* table = node.as_table()) {
    for (const auto& [key, item] : *table) {
      text += (text.empty() ? "" : ", ") + quote(key.str()) + " = " + literal(item);
    }
    return "{" + text + "}";
  }
  std::ostringstream out;
  if (const auto* value = node.as_date()) out << value->get();
  if (const auto* value = node.as_time()) out << value->get();
  if (const auto* value = node.as_date_time()) out << value->get();
  return out.str();
}

std::string_view type_of(const toml::node& node) {
  if (node.is_integer()) return "an integer";
  if (node.is_floating_point()) return "a number with a fraction";
  if (node.is_boolean()) return "a boolean";
  if (node.is_string()) return "a string";
  if (node.is_array()) return "a list";
  if (node.is_table()) return "a table";
  return "a date or time";
}

bool is_bare(std::string_view key) {
  return !key.empty() && std::all_of(key.begin(), key.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  });
}

std::string join(std::string_view path, std::string_view key) {
  std::string joined(path);
  if (!joined.empty()) joined += '.';
  return joined += is_bare(key) ? std::string(key) : quote(key);
}

std::vector<std::string_view> split(std::string_view path) {
  std::vector<std::string_view> parts;
  for (std::size_t dot; (dot = path.find('.')) != path.npos; path.remove_prefix(dot + 1)) {
    parts.push_back(path.substr(0, dot));
  }
  parts.push_back(path);
  return parts;
}

// Calls visit(path, node) for all that is not a table, and for empty tables.
template <class F>
void for_each_leaf(const toml::table& table, const std::string& path, F&& visit) {
  for (const auto& [key, node] : table) {
    const std::string here = join(path, key.str());
    const toml::table* inner = node.as_table();
    if (inner && !inner->empty()) {
      for_each_leaf(*inner, here, visit);
    } else {
      visit(here, node);
    }
  }
}

// The value of an override: TOML, or a bare word.
toml::table parse_override_value(const std::string& text, const std::string& where) {
  const std::size_t first = text.find_first_not_of(" \t");
  const bool toml_only =
      first != text.npos && std::string_view("\"'[{").find(text[first]) != std::string_view::npos;
  if (text.find('\n') == text.npos) {
    try {
      return parse_toml("value = " + text, where);
    } catch (const Error&) {
      if (toml_only) fail_request("malformed override", where, "the value is neither TOML nor a bare word");
    }
  }
  try {
    return parse_toml("value = " + quote(text), where);
  } catch (const Error&) {
    fail_request("malformed override", where, "the value is not valid UTF-8");
  }
}

}  // namespace

struct Config::Impl {
  toml::table root;
  std::string name;
  std::map<std::string, std::string, std::less<>> overridden;  // key -> "--set key=value"
  std::map<std::string, std::string, std::less<>> read;        // key -> its value as a TOML literal

  const toml::node* find(std::string_view key) const {
    const toml::node* node = &root;
    for (const std::string_view part : split(key)) {
      const toml::table* table = node->as_table();
      node = table ? table->get(part) : nullptr;
      if (!node) return nullptr;
    }
    return node;
  }

  std::string where(std::string_view key, const toml::node* node) const {
    if (const auto set = overridden.find(key); set != overridden.end()) return set->second;
    return node && node->source().begin.line > 0 ? name + ":" + std::to_string(node->source().begin.line)
                                                 : name;
  }

  void set(const std::string& assignment) {
    const std::string shown = "--set " + assignment.substr(0, 80);
    const std::size_t equals = assignment.find('=');
    const std::string key = assignment.substr(0, equals);
    const auto parts = split(key);
    if (equals == assignment.npos || !std::all_of(parts.begin(), parts.end(), is_bare) ||
        parts.size() > std::size_t{deepest}) {
      fail_request("malformed override", shown, "write it as key=value, e.g. train.steps=100");
    }
    toml::table parsed = parse_override_value(assignment.substr(equals + 1), shown);
    toml::node& value = *parsed.get("value");
    toml::table* table = &root;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      table = table->emplace<toml::table>(parts[i]).first->second.as_table();
      if (!table) fail_request("malformed override", shown, "'" + std::string(parts[i]) + "' is no table");
    }
    const toml::node* old = table->get(parts.back());
    if (value.is_table() || (old && old->is_table())) {
      fail_request("malformed override", shown, "set the keys of a table one by one");
    }
    table->insert_or_assign(parts.back(), std::move(value));
    overridden[key] = shown;
  }

  [[noreturn]] void fail_value(std::string_view key, const toml::node* node,
                               std::string_view expected) const {
    std::string got(node ? type_of(*node) : "a default");
    if (node && !node->is_table()) got = (got += " ") += literal(*node).substr(0, 60);
    fail_request("wrong value for '" + std::string(key) + "'", where(key, node),
                 "expected " + std::string(expected) + ", got " + got);
  }

  // Reads, checks and records one key. `accept(node)` gives the value, or nothing for a wrong type.
  template <class T, class Accept, class Check>
  T get(std::string_view key, std::optional<T> fallback, std::string_view expected, Accept&& accept,
        Check&& check) {
    const toml::node* node = find(key);
    if (!node && !fallback) {
      fail_request("missing key '" + std::string(key) + "'", name, "add it: " + std::string(expected));
    }
    std::optional<T> value = node ? accept(*node) : std::move(fallback);
    if (!value || !check(*value)) fail_value(key, node, expected);
    read.insert_or_assign(std::string(key), literal(*value));
    return *std::move(value);
  }

  std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high,
                       std::optional<std::int64_t> fallback) {
    std::string expected = "an integer";
    if (high < INT64_MAX) {
      expected += " from " + literal(low) + " to " + literal(high);
    } else if (low > INT64_MIN) {
      expected += " of at least " + literal(low);
    }
    return get<std::int64_t>(
        key, fallback, expected,
        [](const toml::node& node) {
          const auto* value = node.as_integer();
          return value ? std::optional(value->get()) : std::nullopt;
        },
        [&](std::int64_t value) { return value >= low && value <= high; });
  }

  double number(std::string_view key, double low, double high, std::optional<double> fallback) {
    return get<double>(
        key, fallback, "a number from " + literal(low) + " to " + literal(high),
        [](const toml::node& node) -> std::optional<double> {
          if (const auto* value = node.as_floating_point()) return value->get();
          if (const auto* value = node.as_integer()) return static_cast<double>(value->get());
          return std::nullopt;
        },
        [&](double value) { return value >= low && value <= high; });  // false for NaN
  }

  std::string string(std::string_view key, std::optional<std::string> fallback) {
    return get<std::string>(key, std::move(fallback), "a string", string_of,
                            [](const auto&) { return true; });
  }

  static std::optional<std::string> string_of(const toml::node& node) {
    const auto* value = node.as_string();
    return value ? std::optional(value->get()) : std::nullopt;
  }

  template <class T>
  std::vector<T> list(std::string_view key, std::optional<std::vector<T>> fallback,
                      std::string_view expected) {
    return get<std::vector<T>>(
        key, std::move(fallback), expected,
        [](const toml::node& node) -> std::optional<std::vector<T>> {
          const toml::array* array = node.as_array();
          if (!array) return std::nullopt;
          std::vector<T> values;
          for (const auto& item : *array) {
            const auto* value = item.as<T>();
            if (!value) return std::nullopt;
            values.push_back(value->get());
          }
          return values;
        },
        [](const auto&) { return true; });
  }
};

Config::Config(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Config::Config(Config&&) noexcept = default;
Config& Config::operator=(Config&&) noexcept = default;
Config::~Config() = default;

Config Config::from_file(const std::filesystem::path& path, std::span<const std::string> overrides) {
  return from_text(read_file(path), path.string(), overrides);
}

Config Config::from_text(std::string_view text, std::string_view name,
                         std::span<const std::string> overrides) {
  auto impl = std::make_unique<Impl>();
  impl->name = name;
  impl->root = parse_toml(text, name);
  for (const std::string& assignment : overrides) impl->set(assignment);
  return Config(std::move(impl));
}

bool Config::has(std::string_view key) const {
  return impl_->find(key) != nullptr;
}

std::int64_t Config::integer(std::string_view key, std::int64_t low, std::int64_t high) {
  return impl_->integer(key, low, high, std::nullopt);
}

std::int64_t Config::integer(std::string_view key, std::int64_t low, std::int64_t high,
                             std::int64_t fallback) {
  return impl_->integer(key, low, high, fallback);
}

double Config::number(std::string_view key, double low, double high) {
  return impl_->number(key, low, high, std::nullopt);
}

double Config::number(std::string_view key, double low, double high, double fallback) {
  return impl_->number(key, low, high, fallback);
}

bool Config::boolean(std::string_view key, bool fallback) {
  return impl_->get<bool>(
      key, fallback, "true or false",
      [](const toml::node& node) {
        const auto* value = node.as_boolean();
        return value ? std::optional(value->get()) : std::nullopt;
      },
      [](bool) { return true; });
}

std::string Config::string(std::string_view key) {
  return impl_->string(key, std::nullopt);
}

std::string Config::string(std::string_view key, std::string_view fallback) {
  return impl_->string(key, std::string(fallback));
}

std::string Config::choice(std::string_view key, std::span<const std::string_view> choices,
                           std::string_view fallback) {
  std::string expected = "one of";
  for (const std::string_view choice : choices)
    expected += (choice == choices[0] ? " " : ", ") + std::string(choice);
  return impl_->get<std::string>(key, std::string(fallback), expected, Impl::string_of,
                                 [&](const std::string& value) {
                                   return std::find(choices.begin(), choices.end(), value) != choices.end();
                                 });
}

std::vector<std::string> Config::strings(std::string_view key) {
  return impl_->list<std::string>(key, std::nullopt, "a list of strings");
}

std::vector<std::string> Config::strings(std::string_view key, const std::vector<std::string>& fallback) {
  return impl_->list<std::string>(key, fallback, "a list of strings");
}

std::vector<std::int64_t> Config::integers(std::string_view key, const std::vector<std::int64_t>& fallback) {
  return impl_->list<std::int64_t>(key, fallback, "a list of integers");
}

void Config::fail(std::string_view key, std::string_view what, std::string_view what_to_do) const {
  fail_request(std::string(what) + " '" + std::string(key) + "'", impl_->where(key, impl_->find(key)),
               what_to_do);
}

void Config::finish() const {
  struct Unknown {
    std::uint32_t line;
    std::string path, where;
  };
  std::optional<Unknown> first;
  for_each_leaf(impl_->root, "", [&](const std::string& path, const toml::node& node) {
    if (impl_->read.contains(path)) return;
    const auto next = impl_->read.lower_bound(path + ".");
    const bool known_table =
        node.is_table() && next != impl_->read.end() && next->first.starts_with(path + ".");
    const std::uint32_t line = node.source().begin.line;
    if (!known_table && (!first || line < first->line)) first = {line, path, impl_->where(path, &node)};
  });
  if (!first) return;
  std::vector<std::string> known;
  for (const auto& entry : impl_->read) known.push_back(entry.first);
  const std::string near = nearest_name(first->path, known);
  fail_request("unknown key '" + first->path + "'", first->where,
               near.empty() ? "remove it" : "did you mean '" + near + "'?");
}

std::string Config::resolved() const {
  std::map<std::string, std::string> sections;
  for (const auto& [key, value] : impl_->read) {
    const std::size_t dot = key.rfind('.');
    const std::string section = dot == key.npos ? "" : key.substr(0, dot);
    sections[section] += key.substr(dot == key.npos ? 0 : dot + 1) + " = " + value + "\n";
  }
  std::string text;
  for (const auto& [section, lines] : sections) {
    if (!text.empty()) text += '\n';
    if (!section.empty()) text += "[" + section + "]\n";
    text += lines;
  }
  return text;
}

std::vector<std::string> config_differences(std::string_view a, std::string_view b) {
  std::map<std::string, std::pair<std::string, std::string>> values;
  for_each_leaf(parse_toml(a, "first configuration"), "",
                [&](const std::string& path, const toml::node& node) { values[path].first = literal(node); });
  for_each_leaf(
      parse_toml(b, "second configuration"), "",
      [&](const std::string& path, const toml::node& node) { values[path].second = literal(node); });
  std::vector<std::string> differences;
  for (const auto& [path, pair] : values) {
    const auto& [first, second] = pair;
    const auto shown = [](const std::string& value) { return value.empty() ? "(none)" : value; };
    if (first != second) differences.push_back(path + ": " + shown(first) + " -> " + shown(second));
  }
  return differences;
}

}  // namespace megalodon
