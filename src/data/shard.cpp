#include "data/shard.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "base/error.h"
#include "base/hash.h"

namespace megalodon::data {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kMagic = "MGLDSHRD", kEndMagic = "MGLDSEND";
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeader = 64, kFooter = 40, kChecked = 24, kBlock = std::size_t{1} << 20;
constexpr std::int64_t kLargestVocabulary = std::int64_t{1} << 31;

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

std::uint32_t token_bytes_for(std::uint64_t vocabulary_size) {
  return vocabulary_size <= 256 ? 1 : vocabulary_size <= 65536 ? 2 : 4;
}

bool has_magic(const std::byte* at, std::string_view magic) {
  return std::memcmp(at, magic.data(), magic.size()) == 0;
}

[[noreturn]] void fail_shard(std::string_view what, std::string_view where) {
  fail_request(what, where, "write it again with `megalodon data prepare`");
}

std::uint64_t check_of(std::span<const std::byte> header, std::span<const std::byte> footer) {
  std::vector<std::byte> bytes(header.begin(), header.end());
  bytes.insert(bytes.end(), footer.begin(), footer.begin() + kChecked);
  return xxh3(bytes);
}

std::uint64_t hash_of_hashes(std::span<const std::uint64_t> hashes) {
  return xxh3(std::as_bytes(hashes));
}

// T is the stored type. Widens, and returns the largest token.
template <class T>
std::uint32_t widen(const std::byte* from, std::span<std::int32_t> out) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const T token = load<T>(from + i * sizeof(T));
    largest = std::max<std::uint32_t>(largest, token);
    out[i] = static_cast<std::int32_t>(token);
  }
  return largest;
}

template <class T>
void narrow(std::span<const std::int32_t> ids, std::byte* to) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto token = static_cast<T>(ids[i]);
    std::memcpy(to + i * sizeof(T), &token, sizeof(T));
  }
}

}  // namespace

ShardLayout parse_shard(std::span<const std::byte> file, std::string_view where) {
  if (file.empty()) fail_shard("empty token shard", where);
  if (file.size() < kMagic.size() || !has_magic(file.data(), kMagic)) fail_shard("not a token shard", where);
  if (file.size() < kHeader + kFooter) fail_shard("truncated token shard", where);
  const std::byte* footer = file.data() + file.size() - kFooter;
  if (!has_magic(footer + 32, kEndMagic)) fail_shard("truncated token shard", where);
  const auto version = load<std::uint32_t>(file.data() + 8);
  if (version != kVersion) {
    fail_shard("token shard of version " + std::to_string(version) + ", expected " + std::to_string(kVersion),
               where);
  }
  if (load<std::uint64_t>(footer + kChecked) != check_of(file.first(kHeader), {footer, kChecked})) {
    fail_shard("damaged header or footer of a token shard", where);
  }
  ShardLayout layout{.token_bytes = load<std::uint32_t>(file.data() + 12),
                     .vocabulary_size = load<std::uint64_t>(file.data() + 16),
                     .fingerprint = load<std::uint64_t>(file.data() + 24),
                     .tokens = load<std::uint64_t>(footer),
                     .documents = load<std::uint64_t>(footer + 8),
                     .checksum = load<std::uint64_t>(footer + 16),
                     .starts_offset = 0};
  if (layout.vocabulary_size < 1 || layout.vocabulary_size > std::uint64_t{kLargestVocabulary} ||
      layout.token_bytes != token_bytes_for(layout.vocabulary_size)) {
    fail_shard("token shard with a vocabulary of " + std::to_string(layout.vocabulary_size) +
                   " in tokens of " + std::to_string(layout.token_bytes) + " bytes",
               where);
  }
  const std::uint64_t body = file.size() - kHeader - kFooter;
  const auto fits = [&] {  // without overflow: each count is first bounded by the file's size
    if (layout.tokens > body / layout.token_bytes || layout.documents > body / 8) return false;
    const std::uint64_t padded = (layout.tokens * layout.token_bytes + 7) / 8 * 8;
    layout.starts_offset = kHeader + padded;
    return padded + layout.documents * 8 == body;
  };
  if (!fits()) {
    fail_shard("token shard whose size is at odds with its " + std::to_string(layout.tokens) +
                   " tokens and " + std::to_string(layout.documents) + " documents",
               where);
  }
  const std::byte* starts = file.data() + layout.starts_offset;
  for (std::uint64_t i = 0; i < layout.documents; ++i) {
    const auto start = load<std::uint64_t>(starts + i * 8);
    if (start >= layout.tokens || (i > 0 && start <= load<std::uint64_t>(starts + (i - 1) * 8))) {
      fail_shard("damaged document starts of a token shard", where);
    }
  }
  return layout;
}

Shard::Shard(const std::filesystem::path& path)
    : file_(path),
      layout_(parse_shard(file_.bytes(), path.string())),
      tokens_(file_.bytes().data() + kHeader),
      starts_(file_.bytes().data() + layout_.starts_offset) {}

void Shard::read(std::int64_t position, std::span<std::int32_t> out) const {
  const std::byte* from = tokens_ + static_cast<std::size_t>(position) * layout_.token_bytes;
  const std::uint32_t largest = layout_.token_bytes == 1   ? widen<std::uint8_t>(from, out)
                                : layout_.token_bytes == 2 ? widen<std::uint16_t>(from, out)
                                                           : widen<std::uint32_t>(from, out);
  if (largest >= layout_.vocabulary_size && !out.empty()) {
    fail_shard("token " + std::to_string(largest) + " outside the vocabulary of " +
                   std::to_string(layout_.vocabulary_size) + ": the shard is damaged",
               path().string());
  }
}

std::int64_t Shard::document_start(std::int64_t document) const {
  return load<std::int64_t>(starts_ + document * 8);
}

std::int64_t Shard::documents_up_to(std::int64_t position) const {
  std::int64_t low = 0, high = documents();
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (document_start(middle) <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

void Shard::verify() const {
  const auto covered = file_.bytes().first(file_.bytes().size() - kFooter);
  std::vector<std::uint64_t> hashes;
  for (std::size_t at = 0; at < covered.size(); at += kBlock) {
    hashes.push_back(xxh3(covered.subspan(at, std::min(kBlock, covered.size() - at))));
  }
  if (hash_of_hashes(hashes) != layout_.checksum) {
    fail_shard("damaged token shard: its checksum differs", path().string());
  }
}

ShardWriter::ShardWriter(const std::filesystem::path& path, std::int64_t vocabulary_size,
                         std::uint64_t fingerprint)
    : file_(path), path_(path), vocabulary_size_(vocabulary_size) {
  if (vocabulary_size < 1 || vocabulary_size > kLargestVocabulary) {
    fail_request("vocabulary of " + std::to_string(vocabulary_size), path.string(),
                 "use a tokenizer with 1 to 2^31 ids");
  }
  token_bytes_ = token_bytes_for(static_cast<std::uint64_t>(vocabulary_size));
  header_.resize(kHeader);
  std::memcpy(header_.data(), kMagic.data(), kMagic.size());
  std::memcpy(header_.data() + 8, &kVersion, 4);
  std::memcpy(header_.data() + 12, &token_bytes_, 4);
  std::memcpy(header_.data() + 16, &vocabulary_size, 8);
  std::memcpy(header_.data() + 24, &fingerprint, 8);
  put(header_.data(), header_.size());
}

void ShardWriter::put(const void* data, std::size_t size) {
  const auto* bytes = static_cast<const std::byte*>(data);
  while (size > 0) {
    const std::size_t part = std::min(size, kBlock - block_.size());
    block_.insert(block_.end(), bytes, bytes + part);
    bytes += part;
    size -= part;
    if (block_.size() == kBlock) flush();
  }
}

void ShardWriter::flush() {
  if (block_.empty()) return;
  block_hashes_.push_back(xxh3(block_));
  file_.write(block_);
  block_.clear();
}

void ShardWriter::begin_document() {
  begins_document_ = true;
}

void ShardWriter::append(std::span<const std::int32_t> ids) {
  if (ids.empty()) return;
  const auto [low, high] = std::ranges::minmax(ids);
  if (low < 0 || high >= vocabulary_size_) {
    fail_request("token id " + std::to_string(low < 0 ? low : high) + " is outside the vocabulary of " +
                     std::to_string(vocabulary_size_),
                 path_.string(), "use the tokenizer whose vocabulary this is");
  }
  if (begins_document_) starts_.push_back(static_cast<std::uint64_t>(tokens_));
  begins_document_ = false;
  constexpr std::size_t kPart = 4096;
  std::byte narrowed[kPart * 4];
  for (std::size_t at = 0; at < ids.size(); at += kPart) {
    const auto part = ids.subspan(at, std::min(kPart, ids.size() - at));
    if (token_bytes_ == 1) narrow<std::uint8_t>(part, narrowed);
    if (token_bytes_ == 2) narrow<std::uint16_t>(part, narrowed);
    if (token_bytes_ == 4) narrow<std::uint32_t>(part, narrowed);
    put(narrowed, part.size() * token_bytes_);
  }
  tokens_ += static_cast<std::int64_t>(ids.size());
}

std::uint64_t ShardWriter::commit() {
  constexpr std::byte zeros[8]{};
  put(zeros, (8 - static_cast<std::size_t>(tokens_) * token_bytes_ % 8) % 8);
  put(starts_.data(), starts_.size() * 8);
  flush();
  const std::uint64_t counts[3] = {static_cast<std::uint64_t>(tokens_), starts_.size(),
                                   hash_of_hashes(block_hashes_)};
  const std::uint64_t check = check_of(header_, std::as_bytes(std::span(counts)));
  file_.write(std::as_bytes(std::span(counts)));
  file_.write(std::as_bytes(std::span(&check, 1)));
  file_.write(kEndMagic);
  file_.commit();
  return counts[2];
}

}  // namespace megalodon::data
