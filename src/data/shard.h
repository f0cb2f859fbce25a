#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace megalodon::data {

// Token shards: tokens of documents, one behind the other, in one memory-mapped file. Little-endian:
//
//     0  8   magic "MGLDSHRD"
//     8  4   version, 1
//    12  4   bytes of a token w: 1 up to a vocabulary of 256, 2 up to 65,536, else 4
//    16  8   vocabulary size
//    24  8   fingerprint of the tokenizer
//    32  32  zeros
//    64      T tokens, w bytes each; zeros up to a multiple of 8
//            D document starts, 8 bytes each: positions in the shard, strictly ascending, each < T.
//            Tokens before the first continue a document of the shard before.
//            footer: T (8), D (8), checksum (8), check (8), magic "MGLDSEND" (8)
//
// checksum: XXH3 of the XXH3s of the MiB blocks of everything before the footer. check: XXH3 of the header
// and the footer's first 24 bytes.
struct ShardLayout {
  std::uint32_t token_bytes;
  std::uint64_t vocabulary_size, fingerprint, tokens, documents, checksum;
  std::size_t starts_offset;  // bytes from the start of the file
};

// Checks magics, version, sizes against the file's, the check sum of header and footer, and the order of the
// document starts. Request errors name `where`.
ShardLayout parse_shard(std::span<const std::byte> file, std::string_view where);

class Shard {
 public:
  explicit Shard(const std::filesystem::path& path);

  std::int64_t tokens() const { return static_cast<std::int64_t>(layout_.tokens); }
  std::int64_t documents() const { return static_cast<std::int64_t>(layout_.documents); }  // that start here
  std::int64_t vocabulary_size() const { return static_cast<std::int64_t>(layout_.vocabulary_size); }
  std::uint64_t fingerprint() const { return layout_.fingerprint; }
  std::uint64_t checksum() const { return layout_.checksum; }
  const std::filesystem::path& path() const { return file_.path(); }

  // out[i] = token position + i; REQUIRES 0 <= position, position + out.size() <= tokens(). A token outside
  // the vocabulary is a request error.
  void read(std::int64_t position, std::span<std::int32_t> out) const;
  std::int64_t document_start(std::int64_t document) const;
  // How many documents start at or before `position`.
  std::int64_t documents_up_to(std::int64_t position) const;

  // Reads the whole file against its checksum; a request error where it differs.
  void verify() const;

 private:
  MappedFile file_;
  ShardLayout layout_;
  const std::byte* tokens_;
  const std::byte* starts_;
};

// Writes a shard front to back; the file appears whole at commit() or not at all. Holds a MiB and the
// document starts in memory. Errors in writing are work errors.
class ShardWriter {
 public:
  ShardWriter(const std::filesystem::path& path, std::int64_t vocabulary_size, std::uint64_t fingerprint);
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  void begin_document();  // the next token is its first; a document without tokens leaves no trace
  void append(std::span<const std::int32_t> ids);  // an id outside the vocabulary is a request error
  std::int64_t tokens() const { return tokens_; }
  std::int64_t documents() const { return static_cast<std::int64_t>(starts_.size()); }
  // Returns the checksum.
  std::uint64_t commit();

 private:
  void put(const void* data, std::size_t size);
  void flush();

  AtomicFile file_;
  std::filesystem::path path_;
  std::int64_t vocabulary_size_, tokens_ = 0;
  std::uint32_t token_bytes_;
  std::vector<std::byte> header_, block_;
  std::vector<std::uint64_t> block_hashes_, starts_;
  bool begins_document_ = false;
};

}  // namespace megalodon::data
