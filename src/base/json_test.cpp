#include "base/json.h"

#include <limits>

#include "base/testing.h"

namespace megalodon {
namespace {

using testing::contains;
using testing::request_error;

std::string parse_error(std::string_view text) {
  return request_error([&] { parse_json(text, "x.json"); });
}

TEST(ParseJson, Values) {
  const Json value = parse_json(R"( {"a": [1, 2.5, "\u00e9", null, true]} )", "x.json");
  EXPECT_EQ(dump_json(value), R"({"a":[1,2.5,"é",null,true]})");
}

TEST(ParseJson, MalformedTextNamesTheByte) {
  EXPECT_EQ(parse_error(""), "empty where JSON is needed (x.json): check the file");
  EXPECT_EQ(parse_error(" \n"), "empty where JSON is needed (x.json): check the file");
  EXPECT_TRUE(contains(parse_error("[1,]"), "malformed JSON (x.json): byte 3: "));
  EXPECT_TRUE(contains(parse_error("{\"a\":1} x"), "malformed JSON (x.json): byte 8: "));
  EXPECT_TRUE(contains(parse_error("[1"), "byte 2: "));
  EXPECT_TRUE(contains(parse_error("1e999"), "number overflow"));
  EXPECT_LT(parse_error("[" + std::string(100'000, 'x')).size(), 250u);
}

TEST(ParseJson, NestingIsBounded) {
  const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_NO_THROW(parse_json(nested(64), "x.json"));
  EXPECT_EQ(parse_error(nested(65)), "malformed JSON (x.json): byte 64: nested deeper than 64");
  EXPECT_TRUE(contains(parse_error(std::string(1'000'000, '[')), "nested deeper"));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_TRUE(contains(parse_error(objects), "nested deeper"));
  // Brackets in strings do not count.
  EXPECT_NO_THROW(
      parse_json("[\"" + std::string(100, '[') + "\\\"" + std::string(100, '{') + "\"]", "x.json"));
}

TEST(ParseJson, InvalidUtf8IsRefused) {
  for (const char* text :
       {"\"\xff\"", "\"\xc3\"", "\"\xed\xa0\x80\"", "\"\xc0\x80\"", "\"\\ud800\"", "\xff"}) {
    EXPECT_TRUE(contains(parse_error(text), "malformed JSON (x.json): byte")) << text;
  }
}

TEST(ParseJson, ZeroByteIsNotTheEnd) {
  EXPECT_TRUE(contains(parse_error(std::string_view("1\0garbage", 9)), "byte 1: a zero byte"));
}

TEST(JsonMember, ChecksTypes) {
  const Json object = parse_json(R"({"b":true,"i":-3,"u":9223372036854775808,"d":1.5,"s":"x"})", "x.json");
  EXPECT_EQ(json_member<bool>(object, "b", "x.json"), true);
  EXPECT_EQ(json_member<std::int64_t>(object, "i", "x.json"), -3);
  EXPECT_EQ(json_member<double>(object, "d", "x.json"), 1.5);
  EXPECT_EQ(json_member<double>(object, "i", "x.json"), -3.0);
  EXPECT_EQ(json_member<std::string>(object, "s", "x.json"), "x");
  EXPECT_EQ(json_member<std::int64_t>(object, "none", "x.json", 7), 7);
  EXPECT_EQ(json_member<std::int64_t>(object, "i", "x.json", 7), -3);

  EXPECT_EQ(request_error([&] { json_member<std::int64_t>(object, "d", "x.json"); }),
            "wrong value for 'd' (x.json): expected a 64-bit integer, got 1.5");
  EXPECT_EQ(request_error([&] { json_member<std::int64_t>(object, "u", "x.json", 1); }),
            "wrong value for 'u' (x.json): expected a 64-bit integer, got 9223372036854775808");
  EXPECT_EQ(request_error([&] { json_member<bool>(object, "i", "x.json"); }),
            "wrong value for 'i' (x.json): expected true or false, got -3");
  EXPECT_EQ(request_error([&] { json_member<double>(object, "s", "x.json"); }),
            "wrong value for 's' (x.json): expected a number, got \"x\"");
}

TEST(JsonMember, MissingKeysNameTheNearest) {
  const Json object = parse_json(R"({"num_layer":1})", "x.json");
  EXPECT_EQ(request_error([&] { json_member<std::int64_t>(object, "num_layers", "x.json"); }),
            "missing key 'num_layers' (x.json): add it; is 'num_layer' meant?");
  EXPECT_EQ(request_error([&] { json_member<std::int64_t>(object, "zzzzzzzzzzzzzzzzz", "x.json"); }),
            "missing key 'zzzzzzzzzzzzzzzzz' (x.json): add it");
  EXPECT_EQ(request_error([&] { json_member<bool>(Json(3), "a", "x.json"); }),
            "not a JSON object (x.json): expected an object, got number");
}

TEST(DumpJson, AlwaysOneValidLine) {
  EXPECT_EQ(dump_json("a\xff\nb"), "\"a\xEF\xBF\xBD\\nb\"");
  EXPECT_EQ(dump_json(std::numeric_limits<double>::quiet_NaN()), "null");
  EXPECT_EQ(dump_json(std::numeric_limits<double>::infinity()), "null");
}

}  // namespace
}  // namespace megalodon
