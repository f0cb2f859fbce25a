#include "base/json.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/error.h"

namespace megalodon {
namespace {

constexpr int deepest = 64;

// The byte at which brackets nest deeper than allowed, or npos. The parser and the destructor of its values
// recurse, so that this comes first.
std::size_t too_deep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > deepest) return i;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return std::string_view::npos;
}

[[noreturn]] void fail_malformed(std::string_view where, std::size_t byte, std::string_view why) {
  fail_request("malformed JSON", where, "byte " + std::to_string(byte) + ": " + std::string(why));
}

// "[json.exception.parse_error.101] parse error at line 1, column 2: WHY; last read: 'text'" -> "WHY"
std::string cause(std::string_view message) {
  if (const auto end = message.find("; last read"); end != message.npos) message = message.substr(0, end);
  for (const std::string_view prefix : {"] ", "parse error", ": "}) {
    if (const auto at = message.find(prefix); at < 48) {
      message.remove_prefix(at + prefix.size());
    }
  }
  return std::string(message.substr(0, 120));
}

bool holds(const Json& value, bool*) {
  return value.is_boolean();
}
bool holds(const Json& value, std::int64_t*) {
  return value.is_number_integer() &&
         (!value.is_number_unsigned() || value.get<std::uint64_t>() <= std::uint64_t{INT64_MAX});
}
bool holds(const Json& value, double*) {
  return value.is_number();
}
bool holds(const Json& value, std::string*) {
  return value.is_string();
}

const char* expected(bool*) {
  return "true or false";
}
const char* expected(std::int64_t*) {
  return "a 64-bit integer";
}
const char* expected(double*) {
  return "a number";
}
const char* expected(std::string*) {
  return "a string";
}

const Json* find_member(const Json& object, std::string_view key, std::string_view where) {
  if (!object.is_object()) {
    fail_request("not a JSON object", where, std::string("expected an object, got ") + object.type_name());
  }
  const auto member = object.find(std::string(key));
  return member == object.end() ? nullptr : &*member;
}

template <class T>
T checked(const Json& value, std::string_view key, std::string_view where) {
  constexpr T* type = nullptr;
  if (!holds(value, type)) {
    fail_request("wrong value for '" + std::string(key) + "'", where,
                 std::string("expected ") + expected(type) + ", got " + dump_json(value).substr(0, 60));
  }
  return value.get<T>();
}

}  // namespace

Json parse_json(std::string_view text, std::string_view where) {
  if (text.find_first_not_of(" \t\r\n") == text.npos) {
    fail_request("empty where JSON is needed", where, "check the file");
  }
  if (const auto byte = text.find('\0'); byte != text.npos) fail_malformed(where, byte, "a zero byte");
  if (const auto byte = too_deep(text); byte != text.npos) {
    fail_malformed(where, byte, "nested deeper than " + std::to_string(deepest));
  }
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    fail_malformed(where, error.byte == 0 ? 0 : error.byte - 1, cause(error.what()));
  } catch (const Json::exception& error) {  // a number too large for a double
    fail_request("malformed JSON", where, cause(error.what()));
  }
}

template <class T>
T json_member(const Json& object, std::string_view key, std::string_view where) {
  if (const Json* member = find_member(object, key, where)) return checked<T>(*member, key, where);
  std::vector<std::string> names;
  for (const auto& item : object.items()) names.push_back(item.key());
  const std::string near = nearest_name(key, names);
  fail_request("missing key '" + std::string(key) + "'", where,
               near.empty() ? "add it" : "add it; is '" + near + "' meant?");
}

template <class T>
T json_member(const Json& object, std::string_view key, std::string_view where, const T& fallback) {
  const Json* member = find_member(object, key, where);
  return member ? checked<T>(*member, key, where) : fallback;
}

template bool json_member(const Json&, std::string_view, std::string_view);
template bool json_member(const Json&, std::string_view, std::string_view, const bool&);
template std::int64_t json_member(const Json&, std::string_view, std::string_view);
template std::int64_t json_member(const Json&, std::string_view, std::string_view, const std::int64_t&);
template double json_member(const Json&, std::string_view, std::string_view);
template double json_member(const Json&, std::string_view, std::string_view, const double&);
template std::string json_member(const Json&, std::string_view, std::string_view);
template std::string json_member(const Json&, std::string_view, std::string_view, const std::string&);

std::string dump_json(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace megalodon
