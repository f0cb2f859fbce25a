#include "data/tokenizer.h"

#include <algorithm>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

class ByteTokenizer final : public Tokenizer {
 public:
  std::string_view kind() const override { return "byte"; }
  std::int64_t vocabulary_size() const override { return 256; }
  std::uint64_t fingerprint() const override { return xxh3(kind()); }
  void save(const std::filesystem::path& folder) const override {
    write_file_atomically(folder / "tokenizer.json", dump_json({{"type", kind()}}) + "\n");
  }
  void append_ids(std::string_view text, bool, std::vector<std::int32_t>& ids) const override {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
    ids.insert(ids.end(), bytes, bytes + text.size());
  }
  std::size_t separable_prefix(std::string_view text) const override { return text.size(); }
  void append_bytes(std::int32_t id, bool& at_start, std::string& bytes) const override {
    check_id(id);
    at_start = false;
    bytes.push_back(static_cast<char>(id));
  }
};

std::unique_ptr<Tokenizer> load_json(const std::filesystem::path& path) {
  return parse_tokenizer_json(read_file(path), path.string());
}

std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& path) {
  const MappedFile file(path);
  return parse_sentencepiece(file.text(), path.string());
}

// Whether a tokenizer.json is of this program and not another's (Hugging Face's has no member "type").
bool is_own_json(const std::filesystem::path& path) {
  const Json json = parse_json(read_file(path), path.string());
  return json.is_object() && json.contains("type");
}

std::unique_ptr<Tokenizer> parse_characters(const Json& json, std::string_view where) {
  const auto characters = json_member<std::string>(json, "characters", where);
  if (characters.empty()) {
    fail_request("a character tokenizer without characters", where,
                 "restore the file as this program wrote it");
  }
  std::u32string code_points;
  for (std::size_t position = 0; position < characters.size();) {
    const Utf8Step step = utf8_step(characters, position);  // parse_json let only UTF-8 through
    position += step.length;
    if (!code_points.empty() && step.code_point <= code_points.back()) {
      fail_request("\"characters\" are not in ascending order", where,
                   "restore the file as this program wrote it");
    }
    code_points.push_back(step.code_point);
  }
  return make_character_tokenizer(std::move(code_points));
}

std::unique_ptr<Tokenizer> parse_symbols(const Json& json, std::string_view where) {
  const auto member = json.find("symbols");
  const bool is_list = member != json.end() && member->is_array() &&
                       std::ranges::all_of(*member, [](const Json& symbol) { return symbol.is_string(); });
  if (!is_list) fail_request("\"symbols\" is no list of strings", where, "write [\"0\", \"1\", ...]");
  try {
    return make_symbol_tokenizer(member->get<std::vector<std::string>>());
  } catch (const Error& error) {
    fail_request("bad \"symbols\"", where, error.what());
  }
}

}  // namespace

void Tokenizer::check_id(std::int32_t id) const {
  if (id < 0 || id >= vocabulary_size()) {
    fail_request("token id " + std::to_string(id) + " is outside the vocabulary of " +
                     std::to_string(vocabulary_size()),
                 std::string(kind()) + " tokenizer", "use the tokenizer that the ids were made with");
  }
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> ids;
  append_ids(text, false, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const {
  std::string bytes;
  bool at_start = true;
  for (const std::int32_t id : ids) append_bytes(id, at_start, bytes);
  return bytes;
}

// Encodes as much of `text` as stands alone, and returns its length.
std::size_t StreamEncoder::encode_prefix(std::string_view text, std::vector<std::int32_t>& ids) {
  const std::size_t length = tokenizer_.separable_prefix(text);
  if (length > 0) {
    tokenizer_.append_ids(text.substr(0, length), continues_, ids);
    continues_ = true;
  }
  return length;
}

void StreamEncoder::push(std::string_view text, std::vector<std::int32_t>& ids) {
  if (pending_.empty()) {
    pending_ = text.substr(encode_prefix(text, ids));
    next_search_ = 0;
    return;
  }
  pending_ += text;
  if (pending_.size() < next_search_) return;
  const std::size_t done = encode_prefix(pending_, ids);
  pending_.erase(0, done);
  next_search_ = done > 0 ? 0 : 2 * pending_.size();
}

void StreamEncoder::finish(std::vector<std::int32_t>& ids) {
  if (!pending_.empty()) tokenizer_.append_ids(pending_, continues_, ids);
  pending_.clear();
  next_search_ = 0;
  continues_ = false;
}

std::string StreamDecoder::push(std::int32_t id) {
  tokenizer_.append_bytes(id, at_start_, pending_);
  const std::size_t complete = utf8_complete_prefix(pending_);
  std::string text = utf8_repaired(std::string_view(pending_).substr(0, complete));
  pending_.erase(0, complete);
  return text;
}

std::string StreamDecoder::finish() {
  std::string text = utf8_repaired(pending_);
  pending_.clear();
  return text;
}

std::unique_ptr<Tokenizer> make_byte_tokenizer() {
  return std::make_unique<ByteTokenizer>();
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) {
    if (!std::filesystem::exists(path, ignored)) {
      fail_request("no such file or folder", path.string(),
                   "give a model directory, tokenizer.json or tokenizer.model");
    }
    return path.extension() == ".json" ? load_json(path) : load_sentencepiece(path);
  }
  const auto json = path / "tokenizer.json", model = path / "tokenizer.model";
  const bool has_json = std::filesystem::exists(json, ignored);
  // Model directories of other programs hold both: theirs is the .model.
  if (std::filesystem::exists(model, ignored) && !(has_json && is_own_json(json))) {
    return load_sentencepiece(model);
  }
  if (has_json) return load_json(json);
  fail_request("no tokenizer in this folder", path.string(),
               "give a folder with tokenizer.json or tokenizer.model");
}

std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, std::string_view where) {
  const Json json = parse_json(text, where);
  if (!json.is_object() || !json.contains("type")) {
    fail_request("not a tokenizer of this program", where,
                 "use one that it wrote, or give SentencePiece's tokenizer.model");
  }
  const auto type = json_member<std::string>(json, "type", where);
  if (type != "byte" && type != "character" && type != "symbols") {
    fail_request("unknown tokenizer type \"" + excerpt(type) + "\"", where,
                 "use \"byte\", \"character\" or \"symbols\"");
  }
  const std::string_view vocabulary = type == "byte"        ? "type"
                                      : type == "character" ? "characters"
                                                            : "symbols";
  for (const auto& [key, value] : json.items()) {
    if (key != "type" && key != vocabulary) {
      std::string what("unknown member \"");
      fail_request(what.append(excerpt(key)).append("\" of a ").append(type).append(" tokenizer"), where,
                   "remove it");
    }
  }
  if (type == "byte") return make_byte_tokenizer();
  return type == "character" ? parse_characters(json, where) : parse_symbols(json, where);
}

}  // namespace megalodon::data
