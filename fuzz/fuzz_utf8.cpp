#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "data/utf8.h"
#include "fuzz.h"

// UTF-8 and the encoder and decoder of streams: any text, one byte at a time and whole.
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon::data;
  using megalodon::fuzz::require;
  const std::string_view text = megalodon::fuzz::text_of(data, size);
  const std::string repaired = utf8_repaired(text);
  const bool valid = utf8_first_invalid(text) == std::string_view::npos;
  require(utf8_first_invalid(repaired) == std::string::npos, "repaired text is UTF-8");
  require(utf8_repaired(repaired) == repaired, "repaired text stays");
  require(valid == (repaired == text), "UTF-8 needs no repair");

  static const auto bytes = make_byte_tokenizer();
  StreamDecoder decoder(*bytes);
  std::string joined;
  for (const char byte : text) {
    const std::string piece = decoder.push(static_cast<std::uint8_t>(byte));
    require(utf8_first_invalid(piece) == std::string::npos, "pieces are UTF-8");
    joined += piece;
  }
  require(joined + decoder.finish() == repaired, "pieces join to the whole");

  static const auto characters = make_character_tokenizer(U"abc\u00E9\u20AC\U0001F988");
  StreamEncoder encoder(*characters);
  std::vector<std::int32_t> ids;
  for (std::size_t at = 0; at < size; ++at) encoder.push(text.substr(at, 1), ids);
  encoder.finish(ids);
  require(ids == characters->encode(text), "ids of pieces are those of the whole");
  return 0;
}
