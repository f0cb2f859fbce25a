#include "data/corpus.h"

#include <algorithm>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"

namespace megalodon::data {
namespace {

constexpr std::string_view kPrepareAgain = "write it again with `megalodon data prepare`";

const Json& array_member(const Json& object, const char* key, std::string_view where) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array()) {
    fail_request(std::string("no list \"") + key + "\"", where, kPrepareAgain);
  }
  return *found;
}

}  // namespace

std::vector<ManifestShard> parse_manifest(std::string_view text, std::string_view split,
                                          std::string_view where) {
  const Json manifest = parse_json(text, where);
  if (!manifest.is_object() || manifest.value("format", Json()) != "megalodon-corpus") {
    fail_request("not the manifest of a corpus", where, kPrepareAgain);
  }
  const auto version = json_member<std::int64_t>(manifest, "version", where);
  if (version != 1) {
    fail_request("manifest of version " + std::to_string(version) + ", expected 1", where, kPrepareAgain);
  }
  const auto splits = manifest.find("splits");
  if (splits == manifest.end() || !splits->is_object() || !splits->contains(split)) {
    fail_request("no split \"" + std::string(split) + "\"", where,
                 "prepare the data with a validation share or validation files");
  }
  const Json& listed = splits->at(std::string(split));
  if (!listed.is_object()) fail_request("a split that is no object", where, kPrepareAgain);
  std::vector<ManifestShard> shards;
  for (const Json& entry : array_member(listed, "shards", where)) {
    if (!entry.is_object()) fail_request("a shard that is no object", where, kPrepareAgain);
    ManifestShard shard{.file = json_member<std::string>(entry, "file", where),
                        .tokens = json_member<std::int64_t>(entry, "tokens", where),
                        .documents = json_member<std::int64_t>(entry, "documents", where),
                        .checksum = 0};
    const auto checksum = json_member<std::string>(entry, "checksum", where);
    if (checksum.size() != 16 || checksum.find_first_not_of("0123456789abcdef") != std::string::npos) {
      fail_request("checksum \"" + checksum + "\" is no 16 hexadecimal digits", where, kPrepareAgain);
    }
    shard.checksum = std::stoull(checksum, nullptr, 16);
    if (shard.file.empty() || shard.file.find('/') != std::string::npos) {
      fail_request("shard \"" + shard.file + "\" is no file name", where, kPrepareAgain);
    }
    shards.push_back(std::move(shard));
  }
  if (shards.empty()) {
    fail_request("no shards in split \"" + std::string(split) + "\"", where, kPrepareAgain);
  }
  return shards;
}

Corpus::Corpus(const std::filesystem::path& path, std::string_view split) : path_(path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) {
    add(path);
    return;
  }
  const auto manifest = path / "manifest.json";
  if (!std::filesystem::exists(manifest, ignored)) {
    fail_request("no manifest.json in this folder", path.string(),
                 "make token shards with `megalodon data prepare`");
  }
  for (const ManifestShard& listed : parse_manifest(read_file(manifest), split, manifest.string())) {
    add(path / listed.file);
    const Shard& shard = shards_.back().shard;
    if (shard.tokens() != listed.tokens || shard.documents() != listed.documents ||
        shard.checksum() != listed.checksum) {
      fail_request("token shard at odds with manifest.json", shard.path().string(), kPrepareAgain);
    }
  }
}

void Corpus::add(const std::filesystem::path& file) {
  shards_.push_back({Shard(file), tokens_, documents_});
  const Shard& shard = shards_.back().shard;
  if (shard.vocabulary_size() != vocabulary_size() || shard.fingerprint() != fingerprint()) {
    fail_request("token shard of another tokenizer than the one before", file.string(), kPrepareAgain);
  }
  if (shard.tokens() == 0) fail_request("token shard without tokens", file.string(), kPrepareAgain);
  tokens_ += shard.tokens();
  documents_ += shard.documents();
}

void Corpus::read(std::int64_t position, std::span<std::int32_t> out) const {
  const auto length = static_cast<std::int64_t>(out.size());
  if (position < 0 || length > tokens_ || position > tokens_ - length) {
    fail_request("tokens " + std::to_string(position) + " to " + std::to_string(position + length) +
                     " of a corpus of " + std::to_string(tokens_),
                 path_.string(), "stay within the corpus");
  }
  auto part = std::ranges::upper_bound(shards_, position, {}, &Part::first_token);
  for (--part; !out.empty(); ++part) {
    const std::int64_t within = position - part->first_token;
    const auto count =
        std::min<std::size_t>(out.size(), static_cast<std::size_t>(part->shard.tokens() - within));
    part->shard.read(within, out.first(count));
    out = out.subspan(count);
    position += static_cast<std::int64_t>(count);
  }
}

std::int64_t Corpus::document_start(std::int64_t document) const {
  if (document < 0 || document > documents_) {
    fail_request("document " + std::to_string(document) + " of a corpus of " + std::to_string(documents_),
                 path_.string(), "stay within the corpus");
  }
  if (document == documents_) return tokens_;
  const auto part = --std::ranges::upper_bound(shards_, document, {}, &Part::first_document);
  return part->first_token + part->shard.document_start(document - part->first_document);
}

std::int64_t Corpus::document_at(std::int64_t position) const {
  if (position < 0 || position >= tokens_) {
    fail_request("token " + std::to_string(position) + " of a corpus of " + std::to_string(tokens_),
                 path_.string(), "stay within the corpus");
  }
  const auto part = --std::ranges::upper_bound(shards_, position, {}, &Part::first_token);
  return part->first_document + part->shard.documents_up_to(position - part->first_token) - 1;
}

void Corpus::check_tokenizer(const Tokenizer& tokenizer) const {
  if (tokenizer.fingerprint() != fingerprint() || tokenizer.vocabulary_size() != vocabulary_size()) {
    fail_request("token shards of another tokenizer (fingerprint " + hex(fingerprint()) + ", vocabulary " +
                     std::to_string(vocabulary_size()) + ") than this " + std::string(tokenizer.kind()) +
                     " tokenizer (" + hex(tokenizer.fingerprint()) + ", " +
                     std::to_string(tokenizer.vocabulary_size()) + ")",
                 path_.string(), "prepare the data with the model's tokenizer");
  }
}

void Corpus::verify() const {
  for (const Part& part : shards_) part.shard.verify();
}

}  // namespace megalodon::data
