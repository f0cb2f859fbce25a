#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace megalodon {

using Json = nlohmann::json;

// Parses one JSON value. Nesting deeper than 64, trailing text and invalid UTF-8 are request errors that name
// `where` (a path, or path:line) and the byte.
Json parse_json(std::string_view text, std::string_view where);

// A member of an object with its type checked; request errors name `where` and the key. T: bool, int64_t,
// double, std::string. Integers pass as double.
template <class T>
T json_member(const Json& object, std::string_view key, std::string_view where);
template <class T>
T json_member(const Json& object, std::string_view key, std::string_view where, const T& fallback);

// One line of text. Invalid UTF-8 is replaced; non-finite numbers become null.
std::string dump_json(const Json& value);

}  // namespace megalodon
