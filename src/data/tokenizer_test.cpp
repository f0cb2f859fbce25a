#include "data/tokenizer.h"

#include <numeric>

#include "data/testing.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

std::string random_bytes(std::mt19937_64& random, std::size_t size) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

std::unique_ptr<Tokenizer> characters_of(std::string_view text) {
  CharacterCollector collector;
  collector.add(text);
  return make_character_tokenizer(collector.characters());
}

std::vector<std::int32_t> encode_in_pieces(const Tokenizer& tokenizer, std::string_view text,
                                           std::mt19937_64& random, std::size_t longest) {
  std::vector<std::int32_t> ids;
  StreamEncoder encoder(tokenizer);
  while (!text.empty()) {
    const std::size_t length = std::min(text.size(), static_cast<std::size_t>(random() % longest));
    encoder.push(text.substr(0, length), ids);
    text.remove_prefix(length);
  }
  encoder.finish(ids);
  return ids;
}

// Every string that comes out is UTF-8 of whole characters, and all of them together are the whole.
void expect_streams(const Tokenizer& tokenizer, std::span<const std::int32_t> ids) {
  StreamDecoder decoder(tokenizer);
  std::string joined;
  for (const std::int32_t id : ids) {
    const std::string text = decoder.push(id);
    ASSERT_EQ(utf8_first_invalid(text), std::string::npos);
    joined += text;
  }
  joined += decoder.finish();
  EXPECT_EQ(joined, utf8_repaired(tokenizer.decode(ids)));
}

TEST(ByteTokenizer, IsTheBytes) {
  const auto tokenizer = make_byte_tokenizer();
  EXPECT_EQ(tokenizer->vocabulary_size(), 256);
  EXPECT_EQ(tokenizer->end_of_document(), -1);
  EXPECT_EQ(tokenizer->beginning_of_sequence(), -1);
  EXPECT_EQ(tokenizer->encode("A\xFF"), (std::vector<std::int32_t>{65, 255}));
  std::mt19937_64 random(1);
  for (int i = 0; i < 100; ++i) {
    const std::string bytes = random_bytes(random, random() % 100);
    const auto ids = tokenizer->encode(bytes);
    EXPECT_EQ(tokenizer->decode(ids), bytes);
    EXPECT_EQ(encode_in_pieces(*tokenizer, bytes, random, 9), ids);
    expect_streams(*tokenizer, ids);
  }
  EXPECT_ERROR(tokenizer->decode(std::vector{256}), "token id 256 is outside the vocabulary of 256");
  EXPECT_ERROR(tokenizer->decode(std::vector{-1}), "token id -1 is outside");
}

TEST(CharacterTokenizer, NumbersCodePoints) {
  const auto tokenizer = characters_of(
      "ba\xC3\xA9\xF0\x9F\xA6\x88"
      "ab");
  EXPECT_EQ(tokenizer->vocabulary_size(), 6);  // unknown, end, a, b, e acute, a shark
  EXPECT_EQ(tokenizer->end_of_document(), 1);
  EXPECT_EQ(tokenizer->encode("ab\xC3\xA9\xF0\x9F\xA6\x88z\xFF"),
            (std::vector<std::int32_t>{2, 3, 4, 5, kCharacterUnknown, kCharacterUnknown}));
  EXPECT_EQ(tokenizer->decode(std::vector{2, 0, 1, 5}), "a\xEF\xBF\xBD\xF0\x9F\xA6\x88");
  EXPECT_ERROR(tokenizer->decode(std::vector{6}), "token id 6 is outside the vocabulary of 6");
  EXPECT_ERROR(make_character_tokenizer({}), "without characters");
}

TEST(CharacterTokenizer, RoundTripsAndStreams) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 100; ++i) {
    const std::string text = random_text(random, random() % 30 + 1);
    const auto tokenizer = characters_of(text);
    const auto ids = tokenizer->encode(text);
    EXPECT_EQ(tokenizer->decode(ids), text);
    EXPECT_EQ(encode_in_pieces(*tokenizer, text, random, 5), ids);
    expect_streams(*tokenizer, ids);

    const std::string bytes = random_bytes(random, 60);  // not UTF-8: unknown, wherever it is cut
    EXPECT_EQ(encode_in_pieces(*tokenizer, bytes, random, 5), tokenizer->encode(bytes));
  }
}

TEST(CharacterTokenizer, CollectsFromTextCutAnywhere) {
  std::mt19937_64 random(3);
  const std::string text = random_text(random, 50);
  CharacterCollector whole, pieces;
  whole.add(text);
  for (const char byte : text) pieces.add(std::string_view(&byte, 1));
  EXPECT_EQ(whole.characters(), pieces.characters());
}

TEST(SymbolTokenizer, TakesTheLongestSymbol) {
  const auto tokenizer = make_symbol_tokenizer({"1", "12", "1234", ">", "\xC3\xA9", "\xC3\xA9>"});
  EXPECT_EQ(tokenizer->vocabulary_size(), 9);
  EXPECT_EQ(tokenizer->beginning_of_sequence(), 0);
  EXPECT_EQ(tokenizer->end_of_document(), 1);
  EXPECT_EQ(tokenizer->encode("112>1234123"), (std::vector<std::int32_t>{3, 4, 6, 5, 4, kSymbolUnknown}));
  EXPECT_EQ(tokenizer->encode("\xC3\xA9\xC3\xA9>\xC3\xA8\xC3"),
            (std::vector<std::int32_t>{7, 8, kSymbolUnknown, kSymbolUnknown}));
  EXPECT_EQ(tokenizer->decode(std::vector{0, 3, 6, 2, 1}), "1>\xEF\xBF\xBD");
  EXPECT_ERROR(tokenizer->decode(std::vector{9}), "token id 9 is outside the vocabulary of 9");
}

TEST(SymbolTokenizer, HoldsBackWhatALongerSymbolMayTake) {
  const auto tokenizer = make_symbol_tokenizer({"1", "12", "1234", ">", "ab"});
  EXPECT_EQ(tokenizer->separable_prefix("1>"), 2u);
  EXPECT_EQ(tokenizer->separable_prefix(">1"), 1u);
  EXPECT_EQ(tokenizer->separable_prefix("1212"), 2u);
  EXPECT_EQ(tokenizer->separable_prefix("123"), 0u);
  EXPECT_EQ(tokenizer->separable_prefix("1234"), 4u);  // nothing is longer
  EXPECT_EQ(tokenizer->separable_prefix("a"), 0u);     // unknown alone, but "ab" may come
  EXPECT_EQ(tokenizer->separable_prefix("?"), 1u);
  EXPECT_EQ(tokenizer->separable_prefix("?\xC3"), 1u);
}

TEST(SymbolTokenizer, StreamsAsTheWhole) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 300; ++i) {
    const auto word = [&](std::size_t longest) {
      std::string text;
      for (std::size_t n = random() % longest + 1; n > 0; --n)
        text += std::vector<std::string>{"a", "b", "\xC3\xA9", "\xE2\x82\xAC"}[random() % 4];
      return text;
    };
    std::vector<std::string> symbols;
    for (std::size_t n = random() % 8 + 1; n > 0; --n) symbols.push_back(word(4));
    std::ranges::sort(symbols);
    symbols.erase(std::ranges::unique(symbols).begin(), symbols.end());
    const auto tokenizer = make_symbol_tokenizer(symbols);
    for (const std::string& text : {word(40), random_bytes(random, 30), word(9) + random_bytes(random, 3)}) {
      const auto ids = tokenizer->encode(text);
      EXPECT_EQ(encode_in_pieces(*tokenizer, text, random, 4), ids);
      expect_streams(*tokenizer, ids);
    }
    for (std::size_t k = 0; k < symbols.size(); ++k) {
      EXPECT_EQ(tokenizer->encode(symbols[k]), std::vector{kSymbolFirst + static_cast<std::int32_t>(k)});
    }
  }
}

TEST(SymbolTokenizer, RefusesWhatIsNoSymbol) {
  EXPECT_ERROR(make_symbol_tokenizer({}), "without symbols");
  EXPECT_ERROR(make_symbol_tokenizer({"a", ""}), "symbol 1 is empty");
  EXPECT_ERROR(make_symbol_tokenizer({"a", "b", "a"}), "symbol \"a\" is given twice");
  EXPECT_ERROR(make_symbol_tokenizer({std::string(65, 'a')}), "longer than 64 bytes");
  EXPECT_ERROR(make_symbol_tokenizer({"a\xC3"}), "symbol 0 is not UTF-8");
}

TEST(StreamDecoder, HoldsBackUnfinishedCharacters) {
  const auto tokenizer = make_byte_tokenizer();
  StreamDecoder decoder(*tokenizer);
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push(0x9F), "");
  EXPECT_EQ(decoder.push(0xA6), "");
  EXPECT_EQ(decoder.push(0x88), "\xF0\x9F\xA6\x88");
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push('a'),
            "\xEF\xBF\xBD"
            "a");
  EXPECT_EQ(decoder.push(0xC3), "");
  EXPECT_EQ(decoder.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(decoder.finish(), "");
}

TEST(TokenizerFile, SavesAndLoads) {
  const TestFolder folder;
  std::mt19937_64 random(4);
  const std::string text = "\"quotes\", \\ and \t\n" + std::string(1, '\0') + random_text(random, 20);
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  tokenizers.push_back(make_byte_tokenizer());
  tokenizers.push_back(characters_of(text));
  tokenizers.push_back(make_symbol_tokenizer({"\"", "\\", "na", "n", "\xC3\xA9"}));
  for (const auto& tokenizer : tokenizers) {
    tokenizer->save(folder.path());
    for (const auto& path : {folder.path(), folder.path() / "tokenizer.json"}) {
      const auto loaded = load_tokenizer(path);
      EXPECT_EQ(loaded->kind(), tokenizer->kind());
      EXPECT_EQ(loaded->fingerprint(), tokenizer->fingerprint());
      EXPECT_EQ(loaded->vocabulary_size(), tokenizer->vocabulary_size());
      EXPECT_EQ(loaded->encode(text), tokenizer->encode(text));
    }
  }
  EXPECT_NE(characters_of("ab")->fingerprint(), characters_of("abc")->fingerprint());
  EXPECT_NE(make_symbol_tokenizer({"a", "bc"})->fingerprint(),
            make_symbol_tokenizer({"ab", "c"})->fingerprint());
  EXPECT_NE(make_symbol_tokenizer({"a", "b"})->fingerprint(),
            make_symbol_tokenizer({"b", "a"})->fingerprint());
  EXPECT_NE(characters_of("ab")->fingerprint(), make_byte_tokenizer()->fingerprint());
}

TEST(TokenizerFile, RefusesWhatItIsNot) {
  const auto refused = [](std::string_view text, const std::string& message) {
    EXPECT_ERROR(parse_tokenizer_json(text, "t.json"), message);
    EXPECT_ERROR(parse_tokenizer_json(text, "t.json"), "t.json");
  };
  refused("", "");
  refused("[]", "not a tokenizer of this program");
  refused("{\"model\": {}}", "not a tokenizer of this program");
  refused("{\"type\": 3}", "type");
  refused("{\"type\": \"bpe\"}", "unknown tokenizer type \"bpe\"");
  refused("{\"type\": \"" + std::string(1000, 'x') + "\"}", "type \"" + std::string(57, 'x') + "...\"");
  refused("{\"type\": \"byte\", \"" + std::string(56, 'x') + "\u00e9tail\": 1}",
          "member \"" + std::string(56, 'x') + "...\"");
  refused("{\"type\": \"character\"}", "characters");
  refused("{\"type\": \"character\", \"characters\": \"\"}", "without characters");
  refused("{\"type\": \"character\", \"characters\": \"ba\"}", "not in ascending order");
  refused("{\"type\": \"character\", \"characters\": \"aa\"}", "not in ascending order");
  refused("{\"type\": \"character\", \"characters\": \"a\", \"size\": 2}", "unknown member \"size\"");
  refused("{\"type\": \"byte\", \"characters\": \"a\"}", "unknown member \"characters\"");

  refused("{\"type\": \"byte\", \"symbols\": [\"a\"]}", "unknown member \"symbols\"");
  refused("{\"type\": \"symbols\"}", "\"symbols\" is no list of strings");
  refused("{\"type\": \"symbols\", \"symbols\": \"ab\"}", "\"symbols\" is no list of strings");
  refused("{\"type\": \"symbols\", \"symbols\": [\"a\", 1]}", "\"symbols\" is no list of strings");
  refused("{\"type\": \"symbols\", \"symbols\": []}", "without symbols");
  refused("{\"type\": \"symbols\", \"symbols\": [\"a\", \"a\"]}", "given twice");
  refused("{\"type\": \"symbols\", \"symbols\": [\"a\"], \"characters\": \"a\"}",
          "unknown member \"characters\"");

  const std::string whole = "{\"type\":\"character\",\"characters\":\"ab\xC3\xA9\"}";
  for (std::size_t length = 0; length < whole.size(); ++length) {
    refused(std::string_view(whole).substr(0, length), "");
  }
}

TEST(TokenizerFile, NamesWhatIsMissing) {
  const TestFolder folder;
  EXPECT_ERROR(load_tokenizer(folder.path()), "no tokenizer in this folder");
  EXPECT_ERROR(load_tokenizer(folder.path() / "none"), "no such file or folder");
  folder.write("tokenizer.json", "{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\"}}");
  EXPECT_ERROR(load_tokenizer(folder.path()), "not a tokenizer of this program");
  // With a SentencePiece model beside another program's tokenizer.json, the model counts.
  folder.write("tokenizer.model", "no model");
  EXPECT_ERROR(load_tokenizer(folder.path()), "tokenizer.model");
}

}  // namespace
}  // namespace megalodon::data
