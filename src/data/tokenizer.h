#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::data {

// Text to token ids 0 .. vocabulary_size() - 1 and back. Four kinds:
//   byte           the 256 bytes; no special ids
//   character      the code points of a training text, an id for unknown ones, one for the end of a document
//   symbols        given strings, the longest that fits first, and ids for unknown characters and both ends
//   sentencepiece  a tokenizer.model of SentencePiece (Kudo & Richardson, 2018)
// Const members may be called from several threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual std::string_view kind() const = 0;
  virtual std::int64_t vocabulary_size() const = 0;
  // -1 where the kind or the model has none.
  virtual std::int32_t end_of_document() const { return -1; }
  virtual std::int32_t beginning_of_sequence() const { return -1; }
  // The same for tokenizers that encode alike; shards and models record it.
  virtual std::uint64_t fingerprint() const = 0;
  // Writes tokenizer.json (byte, character, symbols) or tokenizer.model (sentencepiece) into `folder`.
  virtual void save(const std::filesystem::path& folder) const = 0;

  // No special ids are added, and none is read out of the text.
  std::vector<std::int32_t> encode(std::string_view text) const;
  // The bytes that the ids stand for; UTF-8 only where the ids spell it (utf8_repaired, StreamDecoder).
  // Special ids stand for no text. An id outside the vocabulary is a request error.
  std::string decode(std::span<const std::int32_t> ids) const;

  // What StreamEncoder and StreamDecoder are made of:

  // Appends the ids of `text`; `continues` where it follows on a prefix cut at separable_prefix().
  virtual void append_ids(std::string_view text, bool continues, std::vector<std::int32_t>& ids) const = 0;
  // Length of the longest prefix that can be encoded before what follows is known, with the ids of the whole.
  virtual std::size_t separable_prefix(std::string_view text) const = 0;
  // Appends the bytes of `id`. `at_start`: nothing was decoded yet (a first word's space is dropped);
  // cleared once text came out.
  virtual void append_bytes(std::int32_t id, bool& at_start, std::string& bytes) const = 0;

 protected:
  void check_id(std::int32_t id) const;
};

// Encodes text that arrives in pieces, cut anywhere: the ids are those of the whole. Holds back what the
// next piece may change: an unfinished character, what may be the beginning of a longer symbol, and for
// SentencePiece the text since the last word began.
class StreamEncoder {
 public:
  explicit StreamEncoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  void push(std::string_view text, std::vector<std::int32_t>& ids);
  void finish(std::vector<std::int32_t>& ids);  // ends the document: the next push starts another

 private:
  std::size_t encode_prefix(std::string_view text, std::vector<std::int32_t>& ids);
  const Tokenizer& tokenizer_;
  std::string pending_;
  std::size_t next_search_ = 0;  // pending text is searched again at this size: linear in all
  bool continues_ = false;
};

// Decodes ids as they come. Every string that it returns is valid UTF-8: unfinished characters are held back,
// ill-formed bytes become U+FFFD. All strings joined are utf8_repaired(tokenizer.decode(ids)).
class StreamDecoder {
 public:
  // `continues`: the ids follow on others (a prompt), so that a first word keeps its space.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool continues = false)
      : tokenizer_(tokenizer), at_start_(!continues) {}
  std::string push(std::int32_t id);
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
  bool at_start_;
};

std::unique_ptr<Tokenizer> make_byte_tokenizer();

// Ids: 0 unknown, 1 end of document, then `characters` in ascending order from 2 on.
inline constexpr std::int32_t kCharacterUnknown = 0, kCharacterEndOfDocument = 1, kCharacterFirst = 2;
std::unique_ptr<Tokenizer> make_character_tokenizer(std::u32string characters);

// Ids: 0 beginning of a sequence, 1 end of a document, 2 unknown character, then `symbols` as they come from
// 3 on. Request errors: a symbol that is empty, given twice, longer than 64 bytes or not UTF-8.
inline constexpr std::int32_t kSymbolBeginning = 0, kSymbolEndOfDocument = 1, kSymbolUnknown = 2,
                              kSymbolFirst = 3;
std::unique_ptr<Tokenizer> make_symbol_tokenizer(std::vector<std::string> symbols);

// Collects the code points of a training text given in pieces, cut anywhere.
class CharacterCollector {
 public:
  CharacterCollector() : seen_(0x110000) {}
  void add(std::string_view text);
  std::u32string characters() const;  // ascending

 private:
  std::vector<bool> seen_;
  std::string pending_;
};

// `path`: a folder with tokenizer.json of this program or tokenizer.model, or one of these files.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);

// {"type": "byte"}, {"type": "character", "characters": "..."} or {"type": "symbols", "symbols": ["...",
// ...]}; request errors name `where`.
std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, std::string_view where);
// The bytes of a tokenizer.model. Without MEGALODON_SENTENCEPIECE in the build, a request error.
std::unique_ptr<Tokenizer> parse_sentencepiece(std::string_view bytes, std::string_view where);

}  // namespace megalodon::data
