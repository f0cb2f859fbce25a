#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/shard.h"
#include "data/tokenizer.h"

namespace megalodon::data {

// A folder that prepare() wrote (manifest.json and one of its splits), or a single .shard file, as one long
// sequence of tokens with the borders of its documents. Memory-mapped: opening reads no tokens.
class Corpus {
 public:
  // Request errors: no manifest, a split that the manifest lacks, shards that are missing, malformed or at
  // odds with the manifest.
  explicit Corpus(const std::filesystem::path& path, std::string_view split = "train");

  std::int64_t tokens() const { return tokens_; }
  std::int64_t documents() const { return documents_; }
  std::int64_t vocabulary_size() const { return shards_.front().shard.vocabulary_size(); }
  std::uint64_t fingerprint() const { return shards_.front().shard.fingerprint(); }

  // out[i] = token position + i. A range that is not within 0 .. tokens() - 1 is a request error.
  void read(std::int64_t position, std::span<std::int32_t> out) const;

  // Where a document begins; document_start(documents()) is tokens().
  std::int64_t document_start(std::int64_t document) const;
  // The document that holds `position`.
  std::int64_t document_at(std::int64_t position) const;

  // A request error where the shards were made with another tokenizer.
  void check_tokenizer(const Tokenizer& tokenizer) const;
  // Reads every shard against its checksum; a request error names the damaged one.
  void verify() const;

 private:
  struct Part {
    Shard shard;
    std::int64_t first_token, first_document;
  };
  void add(const std::filesystem::path& file);
  std::filesystem::path path_;
  std::vector<Part> shards_;
  std::int64_t tokens_ = 0, documents_ = 0;
};

// What prepare() writes into manifest.json and Corpus reads back.
struct ManifestShard {
  std::string file;
  std::int64_t tokens, documents;
  std::uint64_t checksum;
};
// The shards of a split; request errors name `where`.
std::vector<ManifestShard> parse_manifest(std::string_view text, std::string_view split,
                                          std::string_view where);

}  // namespace megalodon::data
