#include <algorithm>
#include <array>
#include <unordered_map>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

constexpr std::size_t kLongestSymbol = 64;  // bytes: the most that one step of encoding tries

class SymbolTokenizer final : public Tokenizer {
 public:
  explicit SymbolTokenizer(std::vector<std::string> symbols)
      : symbols_(std::move(symbols)), sorted_(symbols_.begin(), symbols_.end()) {
    std::ranges::sort(sorted_);
    std::int32_t id = kSymbolFirst;
    for (const std::string& symbol : symbols_) {
      Starting& starting = by_byte_[static_cast<unsigned char>(symbol.front())];
      starting.longest = std::max(starting.longest, symbol.size());
      if (symbol.size() == 1) starting.id = id;
      ids_.emplace(symbol, id++);
    }
    fingerprint_ = xxh3(description());
  }

  std::string_view kind() const override { return "symbols"; }
  std::int64_t vocabulary_size() const override {
    return kSymbolFirst + static_cast<std::int64_t>(symbols_.size());
  }
  std::int32_t end_of_document() const override { return kSymbolEndOfDocument; }
  std::int32_t beginning_of_sequence() const override { return kSymbolBeginning; }
  std::uint64_t fingerprint() const override { return fingerprint_; }
  void save(const std::filesystem::path& folder) const override {
    write_file_atomically(folder / "tokenizer.json", description() + "\n");
  }

  void append_ids(std::string_view text, bool, std::vector<std::int32_t>& ids) const override {
    for (std::size_t position = 0; position < text.size();) {
      const Match match = longest_match(text, position);
      ids.push_back(match.id);
      position += match.length;
    }
  }

  std::size_t separable_prefix(std::string_view text) const override {
    std::size_t position = 0;
    while (position < text.size() && !may_grow(text.substr(position))) {
      position += longest_match(text, position).length;
    }
    return position;
  }

  void append_bytes(std::int32_t id, bool& at_start, std::string& bytes) const override {
    check_id(id);
    at_start = false;
    if (id == kSymbolUnknown) {
      bytes += kReplacement;
    } else if (id >= kSymbolFirst) {
      bytes += symbols_[static_cast<std::size_t>(id - kSymbolFirst)];
    }
  }

 private:
  struct Starting {                    // the symbols that start with a byte
    std::int32_t id = kSymbolUnknown;  // of the byte alone
    std::size_t longest = 1;
  };
  struct Match {
    std::int32_t id;
    std::size_t length;
  };

  std::string description() const { return dump_json({{"type", kind()}, {"symbols", symbols_}}); }

  const Starting& starting_as(std::string_view text) const {
    return by_byte_[static_cast<unsigned char>(text.front())];
  }

  Match longest_match(std::string_view text, std::size_t position) const {
    const std::string_view rest = text.substr(position);
    const Starting& starting = starting_as(rest);
    for (std::size_t length = std::min(starting.longest, rest.size()); length > 1; --length) {
      if (const auto found = ids_.find(rest.substr(0, length)); found != ids_.end()) {
        return {found->second, length};
      }
    }
    if (starting.id != kSymbolUnknown) return {starting.id, 1};
    return {kSymbolUnknown, utf8_step(rest, 0).length};
  }

  // Whether more text may change the first id: `rest` begins a longer symbol, or a character.
  bool may_grow(std::string_view rest) const {
    if (rest.size() < starting_as(rest).longest) {
      const auto next = std::ranges::upper_bound(sorted_, rest);
      if (next != sorted_.end() && next->starts_with(rest)) return true;
    }
    return rest.size() < 4 && utf8_step(rest, 0).kind == Utf8Step::Kind::incomplete;
  }

  std::vector<std::string> symbols_;
  std::vector<std::string_view> sorted_;
  std::unordered_map<std::string_view, std::int32_t> ids_;
  std::array<Starting, 256> by_byte_;
  std::uint64_t fingerprint_ = 0;
};

}  // namespace

std::unique_ptr<Tokenizer> make_symbol_tokenizer(std::vector<std::string> symbols) {
  const auto fail = [](const std::string& what) {
    fail_request(what, "tokenizer",
                 "give distinct symbols of 1 to " + std::to_string(kLongestSymbol) + " bytes");
  };
  if (symbols.empty()) fail("a symbol tokenizer without symbols");
  for (std::size_t i = 0; i < symbols.size(); ++i) {
    const std::string name = "symbol " + std::to_string(i);
    if (symbols[i].empty()) fail(name + " is empty");
    if (symbols[i].size() > kLongestSymbol) fail(name + " is longer than 64 bytes");
    if (utf8_first_invalid(symbols[i]) != std::string::npos) fail(name + " is not UTF-8");
  }
  std::vector<std::string_view> sorted(symbols.begin(), symbols.end());
  std::ranges::sort(sorted);
  const auto twice = std::ranges::adjacent_find(sorted);
  if (twice != sorted.end()) fail("symbol \"" + one_line(*twice) + "\" is given twice");
  return std::make_unique<SymbolTokenizer>(std::move(symbols));
}

}  // namespace megalodon::data
