#include "base/config.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "base/file.h"
#include "base/random.h"
#include "base/testing.h"

namespace megalodon {
namespace {

using testing::contains;
using testing::request_error;

constexpr double infinity = std::numeric_limits<double>::infinity();

Config parse(std::string_view text, const std::vector<std::string>& overrides = {}) {
  return Config::from_text(text, "run.toml", overrides);
}

std::string parse_error(std::string_view text, const std::vector<std::string>& overrides = {}) {
  return request_error([&] { parse(text, overrides); });
}

TEST(Config, ReadsEveryType) {
  Config config = parse(R"(
seed = -3
name = "a \"b\"\t\u00e9"
[train]
rate = 1e-3
whole = 2
fast = true
files = ["a", "b"]
sizes = [1, 2]
)");
  EXPECT_EQ(config.integer("seed", -10, 10), -3);
  EXPECT_EQ(config.string("name"), "a \"b\"\té");
  EXPECT_EQ(config.number("train.rate", 0, 1), 1e-3);
  EXPECT_EQ(config.number("train.whole", 0, 5), 2.0);
  EXPECT_EQ(config.boolean("train.fast", false), true);
  EXPECT_EQ(config.strings("train.files"), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(config.integers("train.sizes", {}), (std::vector<std::int64_t>{1, 2}));
  EXPECT_TRUE(config.has("train.rate"));
  EXPECT_FALSE(config.has("train.none"));
  EXPECT_FALSE(config.has("seed.none"));
  EXPECT_NO_THROW(config.finish());
}

TEST(Config, FallbacksApply) {
  Config config = parse("");
  const std::string_view choices[] = {"cosine", "linear"};
  EXPECT_EQ(config.integer("a", 0, 9, 4), 4);
  EXPECT_EQ(config.number("b", 0, 9, 0.5), 0.5);
  EXPECT_EQ(config.boolean("c", true), true);
  EXPECT_EQ(config.string("d", "x"), "x");
  EXPECT_EQ(config.choice("e", choices, "linear"), "linear");
  EXPECT_EQ(config.strings("f", {"y"}), std::vector<std::string>{"y"});
  EXPECT_EQ(config.integers("g", {7}), std::vector<std::int64_t>{7});
}

TEST(Config, MissingKeys) {
  Config config = parse("");
  EXPECT_EQ(request_error([&] { config.integer("train.steps", 1, 100); }),
            "missing key 'train.steps' (run.toml): add it: an integer from 1 to 100");
  EXPECT_EQ(request_error([&] { config.string("a"); }), "missing key 'a' (run.toml): add it: a string");
  EXPECT_EQ(request_error([&] { config.strings("a"); }),
            "missing key 'a' (run.toml): add it: a list of strings");
}

TEST(Config, WrongTypesNameKeyLineExpectedAndGot) {
  Config config = parse("i = 1.5\ns = 3\nb = 1\nn = \"x\"\nl = [1, \"a\"]\nd = 1979-05-27\n[t]\nx = 1\n");
  EXPECT_EQ(
      request_error([&] { config.integer("i", 0, 9); }),
      "wrong value for 'i' (run.toml:1): expected an integer from 0 to 9, got a number with a fraction 1.5");
  EXPECT_EQ(request_error([&] { config.string("s"); }),
            "wrong value for 's' (run.toml:2): expected a string, got an integer 3");
  EXPECT_EQ(request_error([&] { config.boolean("b", true); }),
            "wrong value for 'b' (run.toml:3): expected true or false, got an integer 1");
  EXPECT_EQ(request_error([&] { config.number("n", 0, 1); }),
            "wrong value for 'n' (run.toml:4): expected a number from 0.0 to 1.0, got a string \"x\"");
  EXPECT_EQ(request_error([&] { config.strings("l"); }),
            "wrong value for 'l' (run.toml:5): expected a list of strings, got a list [1, \"a\"]");
  EXPECT_EQ(request_error([&] { config.integers("l", {}); }),
            "wrong value for 'l' (run.toml:5): expected a list of integers, got a list [1, \"a\"]");
  EXPECT_EQ(request_error([&] { config.string("d"); }),
            "wrong value for 'd' (run.toml:6): expected a string, got a date or time 1979-05-27");
  EXPECT_EQ(request_error([&] { config.integer("t", 0, INT64_MAX); }),
            "wrong value for 't' (run.toml:7): expected an integer of at least 0, got a table");
  EXPECT_EQ(request_error([&] { config.integer("t.x", 2, 3, 2); }),
            "wrong value for 't.x' (run.toml:8): expected an integer from 2 to 3, got an integer 1");
}

TEST(Config, RangesAreInclusiveAndNanIsOutside) {
  Config config = parse("a = 1\nb = 9\nn = nan\ni = inf\nm = -9223372036854775808");
  EXPECT_EQ(config.integer("a", 1, 9), 1);
  EXPECT_EQ(config.integer("b", 1, 9), 9);
  EXPECT_EQ(config.integer("m", INT64_MIN, INT64_MAX), INT64_MIN);
  EXPECT_EQ(config.number("i", 0, infinity), infinity);
  EXPECT_TRUE(contains(request_error([&] { config.number("n", -infinity, infinity); }), "fraction nan"));
  EXPECT_TRUE(
      contains(request_error([&] { config.number("i", 0, 1e308); }), "got a number with a fraction inf"));
  // A fallback out of range would not survive resolved().
  EXPECT_TRUE(contains(request_error([&] { config.integer("z", 1, 9, 0); }), "got a default"));
}

TEST(Config, ChoicesAreListed) {
  Config config = parse("schedule = \"cosin\"");
  const std::string_view choices[] = {"cosine", "linear"};
  EXPECT_EQ(
      request_error([&] { config.choice("schedule", choices, "cosine"); }),
      "wrong value for 'schedule' (run.toml:1): expected one of cosine, linear, got a string \"cosin\"");
}

TEST(Config, UnknownKeysNameLineAndNearestKey) {
  Config config = parse("[train]\nsteps = 1\nstep_count = 2\n\n[trian]\nsteps = 7\n");
  config.integer("train.steps", 0, 9);
  config.integer("train.step_counts", 0, 9, 1);
  EXPECT_EQ(request_error([&] { config.finish(); }),
            "unknown key 'train.step_count' (run.toml:3): did you mean 'train.step_counts'?");
  config.integer("train.step_count", 0, 9);
  EXPECT_EQ(request_error([&] { config.finish(); }),
            "unknown key 'trian.steps' (run.toml:6): did you mean 'train.steps'?");
}

TEST(Config, UnknownTablesAndOddKeys) {
  const auto finish_error = [](std::string_view text) {
    Config config = parse(text);
    config.integer("a.b", 0, 9, 0);
    return request_error([&] { config.finish(); });
  };
  EXPECT_EQ(finish_error("[completely_else]"), "unknown key 'completely_else' (run.toml:1): remove it");
  EXPECT_TRUE(contains(finish_error("\"a.b\" = 1"), "unknown key '\"a.b\"' (run.toml:1)"));
  EXPECT_TRUE(contains(finish_error("[[a.c]]\nx = 1"), "unknown key 'a.c' (run.toml:1)"));
  Config config = parse("[a]\n[a.b.c]");
  config.integer("a.b.c.d", 0, 9, 0);
  EXPECT_NO_THROW(config.finish());
}

TEST(Config, OverridesWin) {
  Config config = parse("[train]\nsteps = 1\nname = \"x\"",
                        {"train.steps=5", "train.name=cosine", "train.rate=1e-4", "train.on=true",
                         "train.files=[\"a\", \"b\"]", "text=\"5\"", "path=/data/a b=c.txt", "empty="});
  EXPECT_EQ(config.integer("train.steps", 0, 9), 5);
  EXPECT_EQ(config.string("train.name"), "cosine");
  EXPECT_EQ(config.number("train.rate", 0, 1), 1e-4);
  EXPECT_EQ(config.boolean("train.on", false), true);
  EXPECT_EQ(config.strings("train.files").size(), 2u);
  EXPECT_EQ(config.string("text"), "5");
  EXPECT_EQ(config.string("path"), "/data/a b=c.txt");
  EXPECT_EQ(config.string("empty"), "");
  EXPECT_NO_THROW(config.finish());
}

TEST(Config, OverridesAreNamedInErrors) {
  Config config = parse("steps = 1", {"steps=abc", "stepz=2"});
  EXPECT_EQ(
      request_error([&] { config.integer("steps", 0, 9); }),
      "wrong value for 'steps' (--set steps=abc): expected an integer from 0 to 9, got a string \"abc\"");
  EXPECT_EQ(config.string("steps"), "abc");
  EXPECT_EQ(request_error([&] { config.finish(); }),
            "unknown key 'stepz' (--set stepz=2): did you mean 'steps'?");
}

TEST(Config, MalformedOverrides) {
  for (const char* text : {"steps", "=1", "a..b=1", ".a=1", "a b=1", "\"a\"=1"}) {
    EXPECT_TRUE(contains(parse_error("", {text}), "write it as key=value")) << text;
  }
  EXPECT_TRUE(contains(parse_error("", {"a=[1"}), "neither TOML nor a bare word"));
  EXPECT_TRUE(contains(parse_error("", {"a=\"x"}), "neither TOML nor a bare word"));
  EXPECT_TRUE(contains(parse_error("", {"a={b = 1}"}), "one by one"));
  EXPECT_TRUE(contains(parse_error("[a]\nb = 1", {"a=1"}), "one by one"));
  EXPECT_TRUE(contains(parse_error("a = 1", {"a.b=1"}), "'a' is no table"));
  EXPECT_TRUE(contains(parse_error("", {"a=\xff"}), "not valid UTF-8"));
  std::string deep = "a";
  for (int i = 0; i < 100'000; ++i) deep += ".a";
  EXPECT_TRUE(contains(parse_error("", {deep + "=1"}), "write it as key=value"));
  // A line break ends no value: what follows is part of the string.
  Config config = parse("", {"a=1\nb = 2"});
  EXPECT_EQ(config.string("a"), "1\nb = 2");
  EXPECT_FALSE(config.has("b"));
}

TEST(Config, MalformedTextNamesTheLine) {
  EXPECT_TRUE(contains(parse_error("a = 1\nb = \n"), "malformed TOML (run.toml:2): "));
  EXPECT_TRUE(contains(parse_error("a = 1\n\na = 2\n"), "malformed TOML (run.toml:3): "));
  EXPECT_TRUE(contains(parse_error("[a]\nb = 1\n[a]\n"), "malformed TOML (run.toml:3): "));
  EXPECT_TRUE(contains(parse_error("[\n"), "malformed TOML (run.toml:"));
  EXPECT_TRUE(contains(parse_error("a = 99999999999999999999"), "malformed TOML (run.toml:1): "));
  EXPECT_TRUE(contains(parse_error("a = \"\xff\""), "malformed TOML (run.toml:1): "));
  EXPECT_TRUE(contains(parse_error(std::string_view("a = 1\0b", 7)), "malformed TOML (run.toml:1): "));
}

// Undefined behaviour in toml++ 3.3, found by fuzzing: seen in the sanitizer builds.
TEST(Config, LettersThatAreNotWhiteSpace) {
  EXPECT_TRUE(contains(parse_error("a\u029e = 1"), "malformed TOML (run.toml:1): "));
  EXPECT_TRUE(contains(parse_error("a = 1 \u029e"), "malformed TOML (run.toml:1): "));
}

TEST(Config, NestingIsBounded) {
  const auto repeated = [](std::string_view part, int times) {
    std::string text;
    for (int i = 0; i < times; ++i) text += part;
    return text;
  };
  constexpr int many = 200'000;
  EXPECT_TRUE(contains(parse_error("\na = " + repeated("[", many)), "(run.toml:2): nested deeper than 32"));
  EXPECT_TRUE(contains(parse_error(repeated("a.", many) + "a = 1"), "nested deeper"));
  EXPECT_TRUE(contains(parse_error("[" + repeated("a.", many) + "a]"), "nested deeper"));
  EXPECT_TRUE(contains(parse_error("a = " + repeated("{a = ", many)), "nested deeper"));
  EXPECT_TRUE(contains(parse_error("[" + repeated("'a' . ", many) + "a]"), "nested deeper"));
  // Quotes, escapes and comments do not hide it ...
  EXPECT_TRUE(contains(parse_error("a = [\"\"\"x\"\"\"\"\", " + repeated("[", many)), "nested deeper"));
  EXPECT_TRUE(contains(parse_error("a = \"\\\\\"\nb = " + repeated("[", many)), "nested deeper"));
  EXPECT_TRUE(contains(parse_error("# \"\nb = '\\'\nc = " + repeated("[", many)), "nested deeper"));
  // ... and what is only text is not counted.
  const std::string text = repeated("[", 100) + repeated("a.", 100);
  Config config = parse("# " + text + "\na = '" + text + "'\nb = \"\\\"" + text + "\"\nc = '''\n" + text +
                        "'''\nd = [" + repeated("1.5, ", 100) + "]\n" + "[" + repeated("x.", 31) + "x]\n" +
                        repeated("y.", 31) + "y = " + repeated("[", 32) + repeated("]", 32));
  EXPECT_EQ(config.string("a"), text);
  EXPECT_EQ(config.string("b"), "\"" + text);
  EXPECT_EQ(config.string("c"), text);
}

// The deepest that the limits let through is freed without trouble.
TEST(Config, DeepestAllowedIsHarmless) {
  std::string dotted, text, end;
  for (int i = 0; i < 31; ++i) dotted += "a.";
  dotted += 'a';
  text = "[" + dotted + "]\n" + dotted + " = ";
  for (int i = 0; i < 32; ++i) {
    text += "{" + dotted + " = ";
    end += '}';
  }
  EXPECT_NO_THROW(parse(text + "1" + end).has("a"));
}

TEST(Config, ResolvedRoundTrips) {
  const std::string text = "seed = 7\n[train]\nrate = 0.1\nname = 'a\"\\'\n[train.deep]\nfiles = ['x\ty']\n";
  const auto read = [](Config& config) {
    const std::string_view choices[] = {"cosine", "linear"};
    config.integer("seed", 0, 9);
    config.number("train.rate", 0, 1);
    config.number("train.decay", 0, 1e30, 1e22);
    config.number("train.small", 0, 1, 1.0 / 3.0);
    config.number("train.none", 0, infinity, infinity);
    config.string("train.name");
    config.string("train.control", "\x01\x7f\n\r\t\"\\é");
    config.strings("train.deep.files");
    config.integers("train.sizes", {1, -2});
    config.integers("train.no_sizes", {});
    config.choice("schedule", choices, "cosine");
    config.boolean("on", true);
    config.finish();
  };
  Config first = parse(text);
  read(first);
  const std::string resolved = first.resolved();
  Config second = parse(resolved);
  read(second);
  EXPECT_EQ(second.resolved(), resolved);
  EXPECT_EQ(second.number("train.small", 0, 1), 1.0 / 3.0);
  EXPECT_EQ(second.string("train.control"), "\x01\x7f\n\r\t\"\\é");
  EXPECT_TRUE(config_differences(resolved, second.resolved()).empty());
  EXPECT_TRUE(contains(resolved, "on = true\n"));
  EXPECT_TRUE(contains(resolved, "\n[train.deep]\nfiles = [\"x\\u0009y\"]\n"));
}

TEST(Config, NumbersRoundTripExactly) {
  Random random(1, Purpose::test, 0);
  for (int i = 0; i < 1000; ++i) {
    const double value = std::ldexp(random.uniform() - 0.5, static_cast<int>(random.below(2000)) - 1000);
    Config first = parse("");
    first.number("x", -infinity, infinity, value);
    Config second = parse(first.resolved());
    EXPECT_EQ(second.number("x", -infinity, infinity), value);
  }
}

TEST(Config, Differences) {
  EXPECT_EQ(config_differences("a = 1\nb = 2\n[c]\nd = 'x'\n", "a = 1\nb = 3\n[c]\ne = [1.5]\n"),
            (std::vector<std::string>{"b: 2 -> 3", "c.d: \"x\" -> (none)", "c.e: (none) -> [1.5]"}));
}

TEST(Config, FailNamesTheKey) {
  const Config config = parse("\ndim = 5", {"heads=3"});
  EXPECT_EQ(request_error([&] { config.fail("dim", "impossible", "make it a multiple of heads"); }),
            "impossible 'dim' (run.toml:2): make it a multiple of heads");
  EXPECT_EQ(request_error([&] { config.fail("heads", "impossible", "x"); }),
            "impossible 'heads' (--set heads=3): x");
  EXPECT_EQ(request_error([&] { config.fail("other", "impossible", "x"); }),
            "impossible 'other' (run.toml): x");
}

TEST(Config, FromFile) {
  const testing::TemporaryFolder folder;
  testing::write_text(folder / "c.toml", "a = 1\nb = x");
  EXPECT_TRUE(contains(request_error([&] { Config::from_file(folder / "c.toml"); }),
                       "malformed TOML (" + (folder / "c.toml").string() + ":2): "));
  EXPECT_TRUE(contains(request_error([&] { Config::from_file(folder / "none.toml"); }), "file not found"));
  testing::write_text(folder / "c.toml", "a = 1");
  const std::string overrides[] = {"a=2"};
  EXPECT_EQ(Config::from_file(folder / "c.toml", overrides).integer("a", 0, 9), 2);
}

}  // namespace
}  // namespace megalodon
