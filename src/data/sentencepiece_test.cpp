#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <cmath>
#include <map>

#include "base/file.h"
#include "data/testing.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

// Trains a model on random text; `arguments` are SentencePiece's own.
std::string train_model(const std::string& arguments) {
  static std::map<std::string, std::string> trained;
  std::string& model = trained[arguments];
  if (!model.empty()) return model;
  const TestFolder folder;
  std::mt19937_64 random(1);
  std::string text;
  for (int line = 0; line < 300; ++line) text += random_text(random, 12) + "\n";
  const auto input = folder.write("text.txt", text);
  sentencepiece::SetMinLogLevel(3);
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      "--input=" + input.string() + " --model_prefix=" + (folder.path() / "m").string() +
      " --vocab_size=400 --hard_vocab_limit=false --num_threads=1 --minloglevel=3 " + arguments);
  EXPECT_TRUE(status.ok()) << status.ToString();
  return model = read_file(folder.path() / "m.model");
}

const std::vector<std::string>& all_arguments() {
  static const std::vector<std::string> arguments{
      "--model_type=unigram",
      ("--model_type=bpe --byte_fallback=true --normalization_rule_name=identity "
       "--remove_extra_whitespaces=false"),
      "--model_type=unigram --add_dummy_prefix=false", "--model_type=bpe --treat_whitespace_as_suffix=true",
      "--model_type=unigram --bos_id=-1 --eos_id=-1"};
  return arguments;
}

std::vector<int> reference_encode(const sentencepiece::SentencePieceProcessor& processor,
                                  const std::string& text) {
  std::vector<int> ids;
  EXPECT_TRUE(processor.Encode(text, &ids).ok());
  return ids;
}

// The same ids, or of the same text with as high a score: a unigram model's near ties may fall otherwise.
void expect_same(const sentencepiece::SentencePieceProcessor& processor, const std::vector<int>& ids,
                 const std::vector<int>& reference) {
  if (ids == reference) return;
  std::string text, reference_text;
  ASSERT_TRUE(processor.Decode(ids, &text).ok() && processor.Decode(reference, &reference_text).ok());
  ASSERT_EQ(text, reference_text);
  double score = 0, reference_score = 0;
  for (const int id : ids) score += processor.GetScore(id);
  for (const int id : reference) reference_score += processor.GetScore(id);
  EXPECT_GT(score, reference_score - 1e-5 * std::abs(reference_score));
}

TEST(SentencePiece, EncodesAndDecodesAsTheLibraryDoes) {
  std::mt19937_64 random(2);
  for (const std::string& arguments : all_arguments()) {
    const std::string model = train_model(arguments);
    const auto tokenizer = parse_sentencepiece(model, "m.model");
    sentencepiece::SentencePieceProcessor processor;
    ASSERT_TRUE(processor.LoadFromSerializedProto(model).ok());
    EXPECT_EQ(tokenizer->vocabulary_size(), processor.GetPieceSize());
    EXPECT_EQ(tokenizer->end_of_document(), processor.eos_id());
    EXPECT_EQ(tokenizer->beginning_of_sequence(), processor.bos_id());
    for (int i = 0; i < 200; ++i) {
      const std::string text = (i % 5 == 0 ? "  " : "") + random_text(random, random() % 20);
      const std::vector<int> ids = reference_encode(processor, text);
      if (arguments.find("bpe") != std::string::npos) {
        ASSERT_EQ(tokenizer->encode(text), ids) << arguments << ": " << text;
      } else {
        expect_same(processor, tokenizer->encode(text), ids);
      }
      std::string decoded;
      ASSERT_TRUE(processor.Decode(ids, &decoded).ok());
      EXPECT_EQ(tokenizer->decode(ids), decoded) << arguments;
    }
  }
}

TEST(SentencePiece, StreamsTextCutAnywhere) {
  std::mt19937_64 random(3);
  for (const std::string& arguments : all_arguments()) {
    const auto tokenizer = parse_sentencepiece(train_model(arguments), "m.model");
    for (int i = 0; i < 200; ++i) {
      const std::string text = (i % 5 == 0 ? "  " : "") + random_text(random, random() % 40);
      const auto ids = tokenizer->encode(text);
      StreamEncoder encoder(*tokenizer);
      std::vector<std::int32_t> streamed;
      for (std::size_t at = 0, length; at < text.size(); at += length) {
        length = std::min<std::size_t>(text.size() - at, random() % 16);
        encoder.push(std::string_view(text).substr(at, length), streamed);
      }
      encoder.finish(streamed);
      ASSERT_EQ(streamed, ids) << arguments << ": " << text;

      StreamDecoder decoder(*tokenizer);
      std::string joined;
      for (const std::int32_t id : ids) {
        const std::string part = decoder.push(id);
        ASSERT_EQ(utf8_first_invalid(part), std::string::npos);
        joined += part;
      }
      joined += decoder.finish();
      EXPECT_EQ(joined, utf8_repaired(tokenizer->decode(ids)));
    }
  }
}

TEST(SentencePiece, EncodesLongTextAsTheLibraryDoes) {
  std::mt19937_64 random(4);
  const std::string model = train_model(all_arguments()[0]);
  const auto tokenizer = parse_sentencepiece(model, "m.model");
  sentencepiece::SentencePieceProcessor processor;
  ASSERT_TRUE(processor.LoadFromSerializedProto(model).ok());
  const std::string text = random_text(random, 100000);
  expect_same(processor, tokenizer->encode(text), reference_encode(processor, text));
}

TEST(SentencePiece, ContinuedDecodingKeepsTheFirstSpace) {
  const auto tokenizer = parse_sentencepiece(train_model(all_arguments()[0]), "m.model");
  const auto ids = tokenizer->encode("na");
  std::string first, continued;
  StreamDecoder a(*tokenizer), b(*tokenizer, true);
  for (const std::int32_t id : ids) {
    first += a.push(id);
    continued += b.push(id);
  }
  EXPECT_EQ(first, "na");
  EXPECT_EQ(continued, " na");
}

TEST(SentencePiece, SavesAndLoads) {
  const TestFolder folder;
  const auto tokenizer = parse_sentencepiece(train_model(all_arguments()[0]), "m.model");
  tokenizer->save(folder.path());
  for (const auto& path : {folder.path(), folder.path() / "tokenizer.model"}) {
    const auto loaded = load_tokenizer(path);
    EXPECT_EQ(loaded->kind(), "sentencepiece");
    EXPECT_EQ(loaded->fingerprint(), tokenizer->fingerprint());
  }
  // Another program's tokenizer.json beside it does not count; this program's does.
  folder.write("tokenizer.json", "{\"version\": \"1.0\"}");
  EXPECT_EQ(load_tokenizer(folder.path())->kind(), "sentencepiece");
  folder.write("tokenizer.json", "{\"type\": \"byte\"}");
  EXPECT_EQ(load_tokenizer(folder.path())->kind(), "byte");
}

TEST(SentencePiece, RefusesBrokenModels) {
  const std::string model = train_model(all_arguments()[0]);
  EXPECT_ERROR(parse_sentencepiece("", "m.model"), "not a SentencePiece model (m.model)");
  EXPECT_ERROR(parse_sentencepiece("no model", "m.model"), "not a SentencePiece model (m.model)");
  const auto piece = [](const std::string& text, char type) {  // of a ModelProto: its field 1
    const std::string fields = "\x0A" + std::string(1, static_cast<char>(text.size())) + text + "\x18" + type;
    return "\x0A" + std::string(1, static_cast<char>(fields.size())) + fields;
  };
  EXPECT_NO_THROW(parse_sentencepiece(piece("<unk>", 2) + piece("a", 1), "m.model"));
  EXPECT_ERROR(parse_sentencepiece(piece("<unk>", 2) + piece("", 1), "m.model"), "(m.model)");
  EXPECT_ERROR(parse_sentencepiece(piece("<unk>", 2) + piece("", 4), "m.model"), "(m.model)");
  EXPECT_ERROR(parse_sentencepiece(piece("a", 1), "m.model"), "(m.model)");
  int refused = 0;
  for (std::size_t length = 0; length < model.size(); length += 7) {
    try {
      const auto tokenizer = parse_sentencepiece(std::string_view(model).substr(0, length), "m.model");
      tokenizer->encode("the nation");  // a cut between two fields is a model with fewer pieces
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 0);
  const auto tokenizer = parse_sentencepiece(model, "m.model");
  const auto size = static_cast<std::int32_t>(tokenizer->vocabulary_size());
  EXPECT_ERROR(tokenizer->decode(std::vector{size}), "is outside the vocabulary");
}

}  // namespace
}  // namespace megalodon::data
