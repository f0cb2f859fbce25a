#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

// Ids by code point, in pages of 256 code points of which those without a character share one.
class IdTable {
 public:
  explicit IdTable(const std::u32string& characters) {
    pages_.emplace_back();
    std::int32_t id = kCharacterFirst;
    for (const char32_t c : characters) {
      std::uint16_t& page = page_of_[c >> 8];
      if (page == 0) {
        page = static_cast<std::uint16_t>(pages_.size());
        pages_.emplace_back();
      }
      pages_[page][c & 0xFF] = id++;
    }
  }
  std::int32_t operator[](char32_t c) const { return pages_[page_of_[c >> 8]][c & 0xFF]; }

 private:
  std::array<std::uint16_t, 0x1100> page_of_{};
  std::vector<std::array<std::int32_t, 256>> pages_;  // zeros: kCharacterUnknown
};
static_assert(kCharacterUnknown == 0);

class CharacterTokenizer final : public Tokenizer {
 public:
  explicit CharacterTokenizer(std::u32string characters)
      : characters_(std::move(characters)), table_(characters_) {
    for (const char32_t c : characters_) append_utf8(c, utf8_);
    fingerprint_ = xxh3("character\n" + utf8_);
  }

  std::string_view kind() const override { return "character"; }
  std::int64_t vocabulary_size() const override {
    return kCharacterFirst + static_cast<std::int64_t>(characters_.size());
  }
  std::int32_t end_of_document() const override { return kCharacterEndOfDocument; }
  std::uint64_t fingerprint() const override { return fingerprint_; }
  void save(const std::filesystem::path& folder) const override {
    write_file_atomically(folder / "tokenizer.json",
                          dump_json({{"type", kind()}, {"characters", utf8_}}) + "\n");
  }

  void append_ids(std::string_view text, bool, std::vector<std::int32_t>& ids) const override {
    const std::size_t before = ids.size();
    ids.resize(before + text.size());
    std::int32_t* id = ids.data() + before;
    for (std::size_t position = 0; position < text.size();) {
      const auto byte = static_cast<unsigned char>(text[position]);
      if (byte < 0x80) {
        *id++ = table_[byte];
        ++position;
        continue;
      }
      const Utf8Step step = utf8_step(text, position);
      *id++ = step.kind == Utf8Step::Kind::character ? table_[step.code_point] : kCharacterUnknown;
      position += step.length;
    }
    ids.resize(static_cast<std::size_t>(id - ids.data()));
  }

  std::size_t separable_prefix(std::string_view text) const override { return utf8_complete_prefix(text); }

  void append_bytes(std::int32_t id, bool& at_start, std::string& bytes) const override {
    check_id(id);
    at_start = false;
    if (id == kCharacterUnknown) {
      bytes += kReplacement;
    } else if (id >= kCharacterFirst) {
      append_utf8(characters_[static_cast<std::size_t>(id - kCharacterFirst)], bytes);
    }
  }

 private:
  std::u32string characters_;
  IdTable table_;
  std::string utf8_;
  std::uint64_t fingerprint_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_character_tokenizer(std::u32string characters) {
  std::ranges::sort(characters);
  const auto repeated = std::ranges::unique(characters);
  characters.erase(repeated.begin(), repeated.end());
  if (characters.empty()) {
    fail_request("a character tokenizer without characters", "tokenizer",
                 "train it on text that is not empty");
  }
  return std::make_unique<CharacterTokenizer>(std::move(characters));
}

void CharacterCollector::add(std::string_view text) {
  std::string joined;
  if (!pending_.empty()) {
    joined = pending_.append(text);
    text = joined;
  }
  const std::size_t complete = utf8_complete_prefix(text);
  for (std::size_t position = 0; position < complete;) {
    const Utf8Step step = utf8_step(text, position);
    if (step.kind == Utf8Step::Kind::character) seen_[step.code_point] = true;
    position += step.length;
  }
  pending_ = text.substr(complete);
}

std::u32string CharacterCollector::characters() const {
  std::u32string characters;
  for (char32_t c = 0; c < seen_.size(); ++c) {
    if (seen_[c]) characters.push_back(c);
  }
  return characters;
}

}  // namespace megalodon::data
