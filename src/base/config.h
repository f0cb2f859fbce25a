#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon {

// A TOML configuration, read key by key. Every get() names the key by its dotted path ("model.layers"),
// checks type and range, and records it; finish() reports keys that nothing asked for, with their line and
// the nearest key that was asked for. The resolved values, defaults included, come out of resolved(): a TOML
// text that parses to the same configuration. Brackets and dotted keys nest at most 32 deep. All errors are
// request errors: `unknown key 'trian.steps' (run.toml:7): did you mean 'train.steps'?`
class Config {
 public:
  // overrides: "key=value" in TOML syntax (a bare word that is not a TOML value counts as a string); they win
  // over the file. A table is set key by key.
  static Config from_file(const std::filesystem::path& path, std::span<const std::string> overrides = {});
  static Config from_text(std::string_view text, std::string_view name,
                          std::span<const std::string> overrides = {});
  Config(Config&&) noexcept;
  Config& operator=(Config&&) noexcept;
  ~Config();

  bool has(std::string_view key) const;

  // Without a fallback the key must be there. `low` and `high` are inclusive, NaN is in no range; a fallback
  // keeps to what is asked of a value.
  std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high);
  std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high, std::int64_t fallback);
  double number(std::string_view key, double low, double high);
  double number(std::string_view key, double low, double high, double fallback);
  bool boolean(std::string_view key, bool fallback);
  std::string string(std::string_view key);
  std::string string(std::string_view key, std::string_view fallback);
  // One of `choices`; the error lists them.
  std::string choice(std::string_view key, std::span<const std::string_view> choices,
                     std::string_view fallback);
  std::vector<std::string> strings(std::string_view key);
  std::vector<std::string> strings(std::string_view key, const std::vector<std::string>& fallback);
  std::vector<std::int64_t> integers(std::string_view key, const std::vector<std::int64_t>& fallback);

  // A request error about a key that was read: `WHAT 'key' (file:line): what_to_do`.
  [[noreturn]] void fail(std::string_view key, std::string_view what, std::string_view what_to_do) const;

  void finish() const;
  std::string resolved() const;

 private:
  struct Impl;
  explicit Config(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The keys in which two resolved configurations differ, as "key: a -> b".
std::vector<std::string> config_differences(std::string_view a, std::string_view b);

}  // namespace megalodon
