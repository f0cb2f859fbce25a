#include <limits>
#include <string>
#include <vector>

#include "base/config.h"
#include "fuzz.h"

namespace megalodon::fuzz {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// Reads some keys in every way, each refused by itself; true if none was.
bool read(Config& config) {
  const std::string_view choices[] = {"x", "abc"};
  bool all = true;
  for (const std::string prefix : {"", "train.", "a."}) {
    all &= takes([&] { config.integer(prefix + "steps", -5, 1'000'000, 1); });
    all &= takes([&] { config.number(prefix + "rate", -infinity, infinity, 0.5); });
    all &= takes([&] { config.boolean(prefix + "on", true); });
    all &= takes([&] { config.string(prefix + "name", "x"); });
    all &= takes([&] { config.choice(prefix + "choice", choices, "x"); });
    all &= takes([&] { config.strings(prefix + "files", {}); });
    all &= takes([&] { config.integers(prefix + "sizes", {1}); });
    all &= takes([&] { config.string(prefix + "b.c.d", "x"); });
  }
  return all;
}

}  // namespace
}  // namespace megalodon::fuzz

// A TOML text, then overrides, a zero byte before each.
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  std::string_view rest = fuzz::text_of(data, size);
  std::vector<std::string> parts;
  for (std::size_t zero; (zero = rest.find('\0')) != rest.npos; rest.remove_prefix(zero + 1)) {
    parts.emplace_back(rest.substr(0, zero));
  }
  parts.emplace_back(rest);
  const std::string text = parts.front();
  parts.erase(parts.begin());

  fuzz::takes(
      [&] { fuzz::require(config_differences(text, text).empty(), "a text does not differ from itself"); });
  fuzz::takes([&] {
    Config config = Config::from_text(text, "input", parts);
    const bool all = fuzz::read(config);
    fuzz::takes([&] { config.finish(); });
    const std::string resolved = config.resolved();
    bool same = false;
    fuzz::takes([&] {
      Config again = Config::from_text(resolved, "resolved");
      same = fuzz::read(again) && again.resolved() == resolved;
      again.finish();
    });
    fuzz::require(same || !all, "a resolved configuration reads back as it was");
  });
  return 0;
}
