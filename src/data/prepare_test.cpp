#include "data/prepare.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "base/file.h"
#include "base/json.h"
#include "data/corpus.h"
#include "data/documents.h"
#include "data/testing.h"

namespace megalodon::data {
namespace {

namespace fs = std::filesystem;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

std::vector<std::int32_t> tokens_of(const Corpus& corpus) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(corpus.tokens()));
  corpus.read(0, tokens);
  return tokens;
}

std::string document_text(const Corpus& corpus, const Tokenizer& tokenizer, std::int64_t document) {
  const std::int64_t begin = corpus.document_start(document);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(corpus.document_start(document + 1) - begin));
  corpus.read(begin, ids);
  return tokenizer.decode(ids);
}

std::string jsonl_line(const std::string& text) {
  return dump_json({{"id", 1}, {"text", text}}) + "\n";
}

TEST(Jsonl, ReadsTextsAndNamesBadLines) {
  const auto read = [](const std::string& lines) {
    std::istringstream stream(lines);
    JsonlReader reader(stream, "f.jsonl");
    std::vector<std::string> texts;
    for (std::string text; reader.next(text);) texts.push_back(text);
    return texts;
  };
  EXPECT_EQ(read("{\"text\": \"a\\nb\"}\r\n\n  \n{\"text\": \"\", \"n\": [1]}\n{\"text\": \"\\u00e9\"}"),
            (std::vector<std::string>{"a\nb", "", "\xC3\xA9"}));
  EXPECT_TRUE(read("").empty());
  const std::string good = "{\"text\": \"a\"}\n\n";
  EXPECT_ERROR(read(good + "{\"text\": \"a\"\n"), "f.jsonl:3");
  EXPECT_ERROR(read(good + "[1]\n"), "a line that is not a JSON object (f.jsonl:3)");
  EXPECT_ERROR(read(good + "{\"body\": \"a\"}\n"), "f.jsonl:3");
  EXPECT_ERROR(read(good + "{\"text\": 5}\n"), "f.jsonl:3");
  EXPECT_ERROR(read(good + "{\"text\": \"a\"} {}\n"), "f.jsonl:3");
  EXPECT_ERROR(read(good + "{\"text\": \"\xFF\"}\n"), "f.jsonl:3");
  EXPECT_ERROR(read(good + "{\"text\": \"\\ud800\"}\n"), "f.jsonl:3");
  EXPECT_ERROR(read(good + std::string(100000, '[') + "\n"), "f.jsonl:3");
}

TEST(Documents, ListsFoldersInOrder) {
  const TestFolder folder;
  folder.write("b/2.txt", "2");
  folder.write("b/1.jsonl", "");
  folder.write("a.txt", "a");
  folder.write(".hidden/x.txt", "x");
  folder.write("b/.x.txt", "x");
  std::vector<fs::path> names;
  for (const auto& file : list_documents(std::vector{folder.path()})) {
    names.push_back(fs::relative(file, folder.path()));
  }
  EXPECT_EQ(names, (std::vector<fs::path>{"a.txt", "b/1.jsonl", "b/2.txt"}));
  EXPECT_ERROR(list_documents({}), "no input");
  EXPECT_ERROR(list_documents(std::vector{folder.path() / "none"}), "no such file or folder");
  EXPECT_ERROR(list_documents(std::vector{folder.path() / ".hidden/none"}), "no such file or folder");
  EXPECT_ERROR(list_documents(std::vector{folder.write("c.jsonl.gz", "")}), "compressed file");
  fs::create_directory(folder.path() / "empty");
  EXPECT_ERROR(list_documents(std::vector{folder.path() / "empty"}), "no file in this folder");
}

TEST(Documents, RefusesTextThatIsNotUtf8) {
  const TestFolder folder;
  const auto sink = [](std::string_view, bool) {};
  const auto latin1 = folder.write("latin1.txt", "caf\xE9 noir");
  EXPECT_ERROR(read_documents(latin1, true, sink), "not UTF-8 at byte 3");
  EXPECT_NO_THROW(read_documents(latin1, false, sink));
  EXPECT_ERROR(read_documents(folder.write("cut.txt", "caf\xC3"), true, sink), "not UTF-8 at byte 3");
  // Characters across the borders of pieces.
  std::string text = "a";
  while (text.size() < (std::size_t{3} << 20)) text += "\xE2\x82\xAC";
  std::string joined;
  read_documents(folder.write("long.txt", text), true,
                 [&](std::string_view piece, bool) { joined += piece; });
  EXPECT_TRUE(joined == text);
  EXPECT_ERROR(read_documents(folder.path(), true, sink), folder.path().string());
}

TEST(Prepare, WritesWhatCorpusReads) {
  const TestFolder folder;
  std::mt19937_64 random(1);
  std::vector<std::string> texts;
  std::string lines;
  for (int i = 0; i < 30; ++i) {
    texts.push_back(random_text(random, random() % 50 + 1));
    lines += jsonl_line(texts.back());
    if (i % 7 == 0) lines += jsonl_line("");
  }
  texts.push_back(random_text(random, 500));
  const std::vector<fs::path> inputs{folder.write("a.jsonl", lines), folder.write("b.txt", texts.back())};
  for (const char* name : {"byte", "character"}) {
    for (const std::int64_t shard_tokens : {61, 1000, 1 << 20}) {
      const auto out = folder.path() / (name + std::to_string(shard_tokens));
      const auto tokenizer = open_tokenizer(name, inputs);
      std::int64_t progressed = 0;
      PrepareOptions options;
      options.shard_tokens = shard_tokens;
      options.progress = [&](std::int64_t bytes) { progressed = bytes; };
      const PrepareSummary summary = prepare(inputs, *tokenizer, out, options);
      const Corpus corpus(out);
      corpus.verify();
      corpus.check_tokenizer(*load_tokenizer(out));
      EXPECT_EQ(summary.train.documents, 31);
      EXPECT_EQ(summary.empty_documents, 5);
      EXPECT_EQ(summary.train.bytes, progressed);
      EXPECT_EQ(summary.train.tokens, corpus.tokens());
      EXPECT_EQ(summary.train.shards, (corpus.tokens() + shard_tokens - 1) / shard_tokens);
      ASSERT_EQ(corpus.documents(), 31);
      std::vector<std::int32_t> expected;
      for (std::int64_t d = 0; d < 31; ++d) {
        const std::string& text = texts[static_cast<std::size_t>(d)];
        EXPECT_EQ(document_text(corpus, *tokenizer, d), text);
        EXPECT_EQ(corpus.document_at(corpus.document_start(d)), d);
        EXPECT_EQ(corpus.document_at(corpus.document_start(d + 1) - 1), d);
        const auto ids = tokenizer->encode(text);
        expected.insert(expected.end(), ids.begin(), ids.end());
        if (tokenizer->end_of_document() >= 0) expected.push_back(tokenizer->end_of_document());
      }
      EXPECT_EQ(tokens_of(corpus), expected);
    }
  }
}

TEST(Prepare, IsDeterministicAndSplitsByShare) {
  const TestFolder folder;
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += jsonl_line("document " + std::to_string(i));
  const std::vector<fs::path> inputs{folder.write("a.jsonl", lines)};
  const auto tokenizer = make_byte_tokenizer();
  PrepareOptions options;
  options.validation_share = 0.03;
  const auto summary = prepare(inputs, *tokenizer, folder.path() / "a", options);
  EXPECT_EQ(summary.train.documents + summary.validation.documents, 1000);
  EXPECT_NEAR(static_cast<double>(summary.validation.documents), 30, 1);
  prepare(inputs, *tokenizer, folder.path() / "b", options);
  options.seed = 1;
  prepare(inputs, *tokenizer, folder.path() / "c", options);
  const auto manifest = [&](const char* name) { return read_file(folder.path() / name / "manifest.json"); };
  EXPECT_EQ(manifest("a"), manifest("b"));
  EXPECT_NE(manifest("a"), manifest("c"));

  // Each document is in one split, whole.
  std::vector<std::string> texts;
  for (const char* split : {"train", "validation"}) {
    const Corpus corpus(folder.path() / "a", split);
    for (std::int64_t d = 0; d < corpus.documents(); ++d) {
      texts.push_back(document_text(corpus, *tokenizer, d));
    }
  }
  std::ranges::sort(texts);
  EXPECT_EQ(std::ranges::unique(texts).size(), 0u);
  EXPECT_EQ(texts.size(), 1000u);
}

TEST(Prepare, TakesValidationFiles) {
  const TestFolder folder;
  const std::vector<fs::path> inputs{folder.write("a.txt", "training")};
  PrepareOptions options;
  options.validation_inputs = {folder.write("v.txt", "held out")};
  const auto tokenizer = make_byte_tokenizer();
  prepare(inputs, *tokenizer, folder.path() / "out", options);
  EXPECT_EQ(document_text(Corpus(folder.path() / "out"), *tokenizer, 0), "training");
  EXPECT_EQ(document_text(Corpus(folder.path() / "out", "validation"), *tokenizer, 0), "held out");
}

TEST(Prepare, LeavesNothingBehindAfterErrors) {
  const TestFolder folder;
  const auto out = folder.path() / "out" / "corpus";
  const auto tokenizer = make_byte_tokenizer();
  const auto refused = [&](const std::vector<fs::path>& inputs, const PrepareOptions& options,
                           const std::string& message) {
    EXPECT_ERROR(prepare(inputs, *tokenizer, out, options), message);
    EXPECT_TRUE(!fs::exists(out.parent_path()) || fs::is_empty(out.parent_path())) << message;
  };
  const std::vector<fs::path> good{folder.write("a.txt", "text")};
  const auto empty = folder.write("empty.txt", "");
  refused({empty}, {}, "no text for training");
  refused({folder.write("bad.jsonl", jsonl_line("a") + "{]\n")}, {}, "bad.jsonl:2");
  refused({folder.path() / "none.txt"}, {}, "no such file or folder");
  refused(good, {.validation_share = 0.9, .validation_inputs = {}, .progress = {}},
          "validation share of 0.9");
  refused(good, {.validation_share = 0.1, .validation_inputs = good, .progress = {}},
          "both a validation share");
  refused(good, {.validation_inputs = {empty}, .progress = {}}, "no text for validation (" + empty.string());
  refused(good, {.validation_inputs = {}, .shard_tokens = 0, .progress = {}}, "shards of 0 tokens");

  prepare(good, *tokenizer, out);
  EXPECT_ERROR(prepare(good, *tokenizer, out), "output exists");
  EXPECT_EQ(Corpus(out).tokens(), 4);
  EXPECT_ERROR(open_tokenizer("character", std::vector{empty}), "without characters");
}

TEST(Prepare, UnreadableInputIsNamed) {
  const TestFolder folder;
  const auto file = folder.write("in/a.txt", "text");
  const auto refused = [&](const fs::path& unreadable) {
    fs::permissions(unreadable, fs::perms::none);
    const uid_t user = ::geteuid();
    if (user == 0) ASSERT_EQ(::seteuid(65534), 0);  // root reads everything
    EXPECT_ERROR(list_documents(std::vector{file.parent_path() / "b.txt"}), file.parent_path().string());
    EXPECT_ERROR(read_documents(file, true, [](std::string_view, bool) {}), "cannot read: Permission denied");
    EXPECT_ERROR(read_documents(file, true, [](std::string_view, bool) {}), file.string());
    if (user == 0) ASSERT_EQ(::seteuid(0), 0);
    fs::permissions(unreadable, fs::perms::owner_all);
  };
  fs::permissions(folder.path(), fs::perms::others_exec, fs::perm_options::add);
  refused(file);
  refused(file.parent_path());
}

// 64 MiB of one document, then of many, within a few MiB more than before.
TEST(Prepare, MemoryStaysBounded) {
  if (kSanitized) GTEST_SKIP() << "AddressSanitizer keeps what was freed";
  const auto peak_kib = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
  };
  const TestFolder folder;
  const auto text = folder.path() / "a.txt", lines = folder.path() / "a.jsonl";
  {
    std::ofstream one(text), many(lines);
    const std::string words(1023, 'x'), line = jsonl_line(words);
    for (int i = 0; i < (64 << 10); ++i) {
      one << words << '\n';
      many << line;
    }
  }
  const auto tokenizer = open_tokenizer("character", std::vector{text});
  const auto before = peak_kib();
  const auto summary = prepare(std::vector{text, lines}, *tokenizer, folder.path() / "out");
  EXPECT_EQ(summary.train.documents, (64 << 10) + 1);
  EXPECT_LT(peak_kib() - before, 24 << 10);
}

class CorpusFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string lines;
    for (int i = 0; i < 10; ++i) lines += jsonl_line("0123456789");
    PrepareOptions options;
    options.shard_tokens = 33;
    prepare(std::vector{folder.write("a.jsonl", lines)}, *make_byte_tokenizer(), out, options);
  }
  TestFolder folder;
  fs::path out = folder.path() / "out";
};

TEST_F(CorpusFiles, ReadsWindowsAcrossShards) {
  const Corpus corpus(out);
  ASSERT_EQ(corpus.tokens(), 100);
  const auto all = tokens_of(corpus);
  for (std::int64_t position = 0; position <= 100; ++position) {
    for (std::int64_t length = 0; position + length <= 100; ++length) {
      std::vector<std::int32_t> window(static_cast<std::size_t>(length), -1);
      corpus.read(position, window);
      ASSERT_TRUE(std::ranges::equal(window, std::span(all).subspan(static_cast<std::size_t>(position),
                                                                    static_cast<std::size_t>(length))));
    }
  }
  std::vector<std::int32_t> window(101);
  EXPECT_ERROR(corpus.read(0, window), "tokens 0 to 101 of a corpus of 100");
  EXPECT_ERROR(corpus.read(-1, std::span(window).first(1)), "tokens -1 to 0");
  EXPECT_ERROR(corpus.read(100, std::span(window).first(1)), "tokens 100 to 101");
  EXPECT_ERROR(corpus.document_start(11), "document 11 of a corpus of 10");
  EXPECT_ERROR(corpus.document_at(100), "token 100 of a corpus of 100");
}

TEST_F(CorpusFiles, ASingleShardIsACorpus) {
  const Corpus corpus(out / "train-00001.shard");
  EXPECT_EQ(corpus.tokens(), 33);
  EXPECT_EQ(corpus.document_start(0), 7);  // its first tokens end document 3
  EXPECT_EQ(corpus.document_at(3), -1);
}

TEST_F(CorpusFiles, RefusesWhatDoesNotFit) {
  EXPECT_ERROR(Corpus(out, "validation"), "no split \"validation\"");
  EXPECT_ERROR(Corpus(folder.path()), "no manifest.json in this folder");
  EXPECT_ERROR(Corpus(folder.path() / "none"), "none");
  const Corpus corpus(out);
  EXPECT_NO_THROW(corpus.check_tokenizer(*make_byte_tokenizer()));
  EXPECT_ERROR(corpus.check_tokenizer(*make_character_tokenizer(U"ab")), "token shards of another tokenizer");

  const auto second = out / "train-00001.shard";
  const std::string whole = read_file(second);
  fs::copy_file(out / "train-00002.shard", second, fs::copy_options::overwrite_existing);
  std::string flipped = whole;
  flipped[70] ^= 1;
  std::ofstream(second, std::ios::binary) << flipped;
  EXPECT_ERROR(Corpus(out).verify(), second.string());
  fs::copy_file(out / "train-00003.shard", second, fs::copy_options::overwrite_existing);
  EXPECT_ERROR(Corpus{out}, "token shard at odds with manifest.json (" + second.string());
  std::ofstream(second, std::ios::binary) << whole.substr(0, 100);
  EXPECT_ERROR(Corpus{out}, "truncated token shard (" + second.string());
  fs::remove(second);
  EXPECT_ERROR(Corpus{out}, second.string());
}

TEST_F(CorpusFiles, RefusesBrokenManifests) {
  const std::string whole = read_file(out / "manifest.json");
  const auto refused = [&](const std::string& text) {
    EXPECT_ERROR(parse_manifest(text, "train", "manifest.json"), "manifest.json");
  };
  ASSERT_EQ(parse_manifest(whole, "train", "m").size(), 4u);
  for (std::size_t length = 0; length + 2 < whole.size(); ++length) refused(whole.substr(0, length));
  const auto changed = [&](const std::function<void(Json&)>& change) {
    Json json = Json::parse(whole);
    change(json);
    refused(json.dump());
  };
  changed([](Json& json) { json["version"] = 2; });
  changed([](Json& json) { json["format"] = 3; });
  changed([](Json& json) { json["splits"] = Json::array(); });
  changed([](Json& json) { json["splits"]["train"] = 1; });
  changed([](Json& json) { json["splits"]["train"]["shards"] = Json::array(); });
  changed([](Json& json) { json["splits"]["train"]["shards"][0] = 1; });
  changed([](Json& json) { json["splits"]["train"]["shards"][0]["file"] = "../train-00000.shard"; });
  changed([](Json& json) { json["splits"]["train"]["shards"][0]["checksum"] = "12"; });
  changed([](Json& json) { json["splits"]["train"]["shards"][0]["tokens"] = "12"; });
}

}  // namespace
}  // namespace megalodon::data
