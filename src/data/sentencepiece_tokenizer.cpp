// The only file that sees SentencePiece. Its headers declare no protobuf, and none is included.
#include <sentencepiece_processor.h>

#include <algorithm>
#include <exception>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, SentencePiece's space

bool is_space(char32_t c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200F) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x2060 || c == 0x3000 || c == 0xFEFF;
}

// Whether the character that ends before `position` is one and no space.
bool word_ends_at(std::string_view text, std::size_t position) {
  std::size_t begin = position;
  do {
    if (begin == 0) return false;
    --begin;
  } while ((static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80);
  const Utf8Step step = utf8_step(text, begin);
  return step.kind == Utf8Step::Kind::character && !is_space(step.code_point);
}

bool word_begins_at(std::string_view text, std::size_t position) {
  if (position >= text.size()) return false;
  const Utf8Step step = utf8_step(text, position);
  return step.kind == Utf8Step::Kind::character && !is_space(step.code_point);
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view model, std::string_view where) : model_(model) {
    sentencepiece::SetMinLogLevel(3);  // its own lines on stderr; what fails comes back as a status
    if (!load()) {
      fail_request("not a SentencePiece model", where, "give the tokenizer.model that SentencePiece wrote");
    }
    std::string normal = processor_.Normalize("a"), spaced = processor_.Normalize("a  a");
    word_space_ = normal.starts_with(kSpace) || normal.ends_with(kSpace);
    merges_spaces_ = count_spaces(spaced) == count_spaces(normal) + 1;
    newline_is_space_ = processor_.Normalize("a\na") == processor_.Normalize("a a");
    for (int id = 0; id < processor_.GetPieceSize(); ++id) pieces_.push_back(bytes_of(id));
  }

  std::string_view kind() const override { return "sentencepiece"; }
  std::int64_t vocabulary_size() const override { return static_cast<std::int64_t>(pieces_.size()); }
  std::int32_t end_of_document() const override { return processor_.eos_id(); }
  std::int32_t beginning_of_sequence() const override { return processor_.bos_id(); }
  std::uint64_t fingerprint() const override { return xxh3(model_); }
  void save(const std::filesystem::path& folder) const override {
    write_file_atomically(folder / "tokenizer.model", model_);
  }

  // Encodes each run between two cuts by itself, so that the ids do not depend on the pieces that a text
  // comes in: over a long text a unigram model's sums of scores round, and near ties fall otherwise.
  void append_ids(std::string_view text, bool continues, std::vector<std::int32_t>& ids) const override {
    std::vector<int> encoded;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = next_cut(text, begin);
      std::string_view run = text.substr(begin, end - begin);
      // The space at a cut is the one that the model adds to a first word (or behind a last one) of itself.
      if ((begin > 0 || continues) && word_space_ && is_break(run[0])) run.remove_prefix(1);
      const auto status = processor_.Encode(run, &encoded);
      if (!status.ok()) {
        fail_work("SentencePiece could not encode the text: " + status.ToString(), "tokenizer.model",
                  "check that the model is whole");
      }
      ids.insert(ids.end(), encoded.begin(), encoded.end());
      begin = end;
    }
  }

  std::size_t separable_prefix(std::string_view text) const override {
    for (std::size_t position = text.size(); position-- > 1;) {
      if (is_cut(text, position)) return position;
    }
    return 0;
  }

  void append_bytes(std::int32_t id, bool& at_start, std::string& bytes) const override {
    check_id(id);
    std::string_view piece = pieces_[static_cast<std::size_t>(id)];
    const bool is_word = !processor_.IsByte(id) && !processor_.IsUnknown(id);
    if (at_start && is_word && (word_space_ || merges_spaces_) && piece.starts_with(' ')) {
      piece.remove_prefix(1);
      at_start = merges_spaces_;  // then the spaces of further pieces go too, until text came
    }
    if (!piece.empty()) at_start = false;
    bytes += piece;
  }

 private:
  // A malformed model comes back as a status or, out of the tries inside, as an exception.
  bool load() {
    try {
      return processor_.LoadFromSerializedProto(model_).ok() && processor_.GetPieceSize() > 0;
    } catch (const std::exception&) {
      return false;
    }
  }

  static int count_spaces(std::string_view text) {
    int count = 0;
    for (std::size_t at = 0; (at = text.find(kSpace, at)) != std::string_view::npos; ++at) ++count;
    return count;
  }

  bool is_break(char c) const { return c == ' ' || (c == '\n' && newline_is_space_); }

  // Before a single space between two words: no piece crosses it in models that split at spaces, and the
  // space that append_ids drops comes back as the one that the model adds. (Where it adds none but strips
  // them, a space at a beginning would be lost.)
  bool is_cut(std::string_view text, std::size_t position) const {
    return is_break(text[position]) && (word_space_ || !merges_spaces_) && word_ends_at(text, position) &&
           word_begins_at(text, position + 1);
  }

  std::size_t next_cut(std::string_view text, std::size_t begin) const {
    std::size_t position = begin + 1;
    while (position < text.size() && !is_cut(text, position)) ++position;
    return std::min(position, text.size());
  }

  std::string bytes_of(int id) const {
    if (processor_.IsControl(id)) return {};
    if (processor_.IsUnknown(id)) return std::string(kReplacement);
    const std::string& piece = processor_.IdToPiece(id);
    if (processor_.IsByte(id)) {  // "<0x0A>"
      return piece.size() == 6 ? std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)))
                               : std::string(kReplacement);
    }
    std::string bytes;
    for (std::size_t at = 0; at < piece.size();) {
      const bool space = piece.compare(at, kSpace.size(), kSpace) == 0;
      bytes.push_back(space ? ' ' : piece[at]);
      at += space ? kSpace.size() : 1;
    }
    return bytes;
  }

  std::string model_;
  sentencepiece::SentencePieceProcessor processor_;
  std::vector<std::string> pieces_;  // the bytes of each id
  bool word_space_;                  // the model adds a space to a text's first (or last) word
  bool merges_spaces_;               // runs of spaces become one
  bool newline_is_space_;
};

}  // namespace

std::unique_ptr<Tokenizer> parse_sentencepiece(std::string_view bytes, std::string_view where) {
  return std::make_unique<SentencePieceTokenizer>(bytes, where);
}

}  // namespace megalodon::data
