#include "data/shard.h"

#include <cstring>
#include <numeric>

#include "base/hash.h"
#include "data/testing.h"

namespace megalodon::data {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::uint64_t write_shard(const std::filesystem::path& path, std::int64_t vocabulary,
                          const std::vector<std::vector<std::int32_t>>& documents,
                          std::uint64_t fingerprint = 7) {
  ShardWriter writer(path, vocabulary, fingerprint);
  for (const auto& document : documents) {
    writer.begin_document();
    writer.append(document);
  }
  return writer.commit();
}

TEST(Shard, RoundTripsInEveryWidth) {
  const TestFolder folder;
  std::mt19937_64 random(1);
  for (const std::int64_t vocabulary : {1, 2, 256, 257, 65536, 65537, 1 << 20}) {
    std::vector<std::vector<std::int32_t>> documents(20);
    std::vector<std::int32_t> all;
    for (auto& document : documents) {
      document.resize(random() % 9000 + 1);
      for (auto& id : document) {
        id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(vocabulary));
      }
      all.insert(all.end(), document.begin(), document.end());
    }
    const auto path = folder.path() / "a.shard";
    const std::uint64_t checksum = write_shard(path, vocabulary, documents);
    const Shard shard(path);
    shard.verify();
    EXPECT_EQ(shard.checksum(), checksum);
    EXPECT_EQ(shard.vocabulary_size(), vocabulary);
    EXPECT_EQ(shard.fingerprint(), 7u);
    ASSERT_EQ(shard.tokens(), static_cast<std::int64_t>(all.size()));
    ASSERT_EQ(shard.documents(), 20);
    std::vector<std::int32_t> read(all.size());
    shard.read(0, read);
    EXPECT_EQ(read, all);
    std::int64_t start = 0;
    for (std::int64_t i = 0; i < 20; ++i) {
      EXPECT_EQ(shard.document_start(i), start);
      EXPECT_EQ(shard.documents_up_to(start), i + 1);
      start += static_cast<std::int64_t>(documents[static_cast<std::size_t>(i)].size());
      EXPECT_EQ(shard.documents_up_to(start - 1), i + 1);
    }
  }
}

TEST(Shard, MayBeginWithinADocumentOrHoldNothing) {
  const TestFolder folder;
  const auto path = folder.path() / "a.shard";
  ShardWriter writer(path, 256, 0);
  writer.append(std::vector{1, 2});
  writer.begin_document();
  writer.begin_document();  // the one before has no token
  writer.append({});
  writer.append(std::vector{3});
  writer.commit();
  const Shard shard(path);
  EXPECT_EQ(shard.documents(), 1);
  EXPECT_EQ(shard.documents_up_to(1), 0);
  EXPECT_EQ(shard.document_start(0), 2);

  write_shard(folder.path() / "empty.shard", 256, {});
  const Shard empty(folder.path() / "empty.shard");
  empty.verify();
  EXPECT_EQ(empty.tokens(), 0);
}

TEST(Shard, RefusesIdsOutsideTheVocabulary) {
  const TestFolder folder;
  const auto path = folder.path() / "a.shard";
  {
    ShardWriter writer(path, 300, 0);
    EXPECT_ERROR(writer.append(std::vector{1, 300}), "token id 300 is outside the vocabulary of 300");
    EXPECT_ERROR(writer.append(std::vector{-5, 2}), "token id -5 is outside");
    EXPECT_ERROR(ShardWriter(path, 0, 0), "vocabulary of 0");
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));  // without commit() nothing stays
}

TEST(Shard, RefusesEveryTruncationAndEveryExtension) {
  const TestFolder folder;
  write_shard(folder.path() / "a.shard", 300, {{1, 2, 3}, {4, 5}});
  const std::string whole = read_file(folder.path() / "a.shard");
  EXPECT_NO_THROW(parse_shard(bytes_of(whole), "a"));
  EXPECT_ERROR(parse_shard({}, "a.shard"), "empty token shard (a.shard)");
  for (std::size_t length = 0; length < whole.size(); ++length) {
    EXPECT_ERROR(parse_shard(bytes_of(whole).first(length), "a.shard"), "token shard (a.shard)");
    // The footer of the whole behind a body that lacks bytes.
    if (length + 40 >= whole.size() || length < 64) continue;
    const std::string spliced = whole.substr(0, length) + whole.substr(whole.size() - 40);
    EXPECT_ERROR(parse_shard(bytes_of(spliced), "a.shard"), "at odds with its 5 tokens and 2 documents");
  }
  EXPECT_ERROR(parse_shard(bytes_of(whole + "x"), "a.shard"), "truncated token shard");
  EXPECT_ERROR(Shard(folder.path() / "none.shard"), "none.shard");
}

TEST(Shard, SeesEveryFlippedBit) {
  const TestFolder folder;
  const auto path = folder.path() / "a.shard";
  write_shard(path, 300, {{1, 2, 3}, {4, 5}});
  const std::string whole = read_file(path);
  for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ 1 << bit % 8);
    folder.write("a.shard", flipped);
    EXPECT_ERROR(Shard(path).verify(), path.string());
  }
}

TEST(Shard, ReadRefusesDamagedTokens) {
  const TestFolder folder;
  const auto path = folder.path() / "a.shard";
  write_shard(path, 300, {{1, 2, 3}});
  std::string damaged = read_file(path);
  damaged[64 + 2 * 1 + 1] = '\x40';  // the second token's high byte
  folder.write("a.shard", damaged);
  const Shard shard(path);
  std::vector<std::int32_t> out(3);
  EXPECT_ERROR(shard.read(0, out), "token 16386 outside the vocabulary of 300");
  EXPECT_NO_THROW(shard.read(0, std::span(out).first(1)));
}

// A file whose check sums fit, with the counts and starts given.
std::string forged(std::uint32_t token_bytes, std::uint64_t vocabulary, std::uint64_t tokens,
                   std::uint64_t documents, const std::string& body) {
  std::string file = "MGLDSHRD";
  const auto put = [&](auto value) { file.append(reinterpret_cast<const char*>(&value), sizeof value); };
  put(std::uint32_t{1});
  put(token_bytes);
  put(vocabulary);
  put(std::uint64_t{0});
  file.resize(64);
  std::string checked = file;
  file += body;
  const std::size_t footer = file.size();
  put(tokens);
  put(documents);
  put(std::uint64_t{0});
  checked += file.substr(footer);
  put(xxh3(checked));
  return file + "MGLDSEND";
}

TEST(Shard, RefusesForgedCounts) {
  const auto refused = [](const std::string& file, const std::string& message) {
    EXPECT_ERROR(parse_shard(bytes_of(file), "a.shard"), message);
  };
  const std::string zeros(16, '\0');
  EXPECT_NO_THROW(parse_shard(bytes_of(forged(1, 256, 8, 1, zeros)), "a"));
  refused(forged(2, 256, 4, 1, zeros), "vocabulary of 256 in tokens of 2 bytes");
  refused(forged(0, 256, 4, 1, zeros), "vocabulary of 256 in tokens of 0 bytes");
  refused(forged(1, 0, 8, 1, zeros), "vocabulary of 0");
  refused(forged(4, std::uint64_t{1} << 32, 2, 1, zeros), "vocabulary of 4294967296");
  refused(forged(1, 256, std::uint64_t{1} << 63, 1, zeros), "at odds");
  refused(forged(1, 256, 8, std::uint64_t{1} << 61, zeros), "at odds");  // * 8 wraps to 0
  refused(forged(4, 1 << 20, std::uint64_t{1} << 62, 2, zeros), "at odds");
  refused(forged(1, 256, UINT64_MAX, 2, zeros), "at odds");
  refused(forged(1, 256, 0, 2, zeros), "damaged document starts");
  refused(forged(1, 256, 8, 2, zeros + std::string(8, '\0')), "damaged document starts");  // 0, 0
  refused(forged(1, 256, 8, 1, std::string(8, '\0') + std::string(8, '\xFF')), "damaged document starts");
}

}  // namespace
}  // namespace megalodon::data
