#include <vector>

#include "data/tokenizer.h"
#include "fuzz.h"

// tokenizer.json
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  fuzz::takes([&] {
    const auto tokenizer = data::parse_tokenizer_json(fuzz::text_of(data, size), "input");
    const auto text = fuzz::text_of(data, size);
    const auto ids = tokenizer->encode(text);
    tokenizer->decode(ids);
    std::vector<std::int32_t> streamed;
    data::StreamEncoder encoder(*tokenizer);
    for (std::size_t i = 0; i < text.size(); i += 3) encoder.push(text.substr(i, 3), streamed);
    encoder.finish(streamed);
    fuzz::require(streamed == ids, "pieces encode as the whole");
    const auto kind = tokenizer->kind();
    const auto first = kind == "byte" ? 0 : kind == "symbols" ? data::kSymbolFirst : data::kCharacterFirst;
    for (std::int32_t id = first; id < tokenizer->vocabulary_size(); ++id) {
      fuzz::require(tokenizer->encode(tokenizer->decode({&id, 1})) == std::vector{id}, "ids come back");
    }
  });
  return 0;
}
