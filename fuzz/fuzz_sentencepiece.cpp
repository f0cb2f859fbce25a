#include "data/tokenizer.h"
#include "fuzz.h"

// tokenizer.model; the library itself is not instrumented.
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  fuzz::takes([&] {
    const auto tokenizer = data::parse_sentencepiece(fuzz::text_of(data, size), "input");
    tokenizer->decode(tokenizer->encode("The nation\nof 2 \xE2\x82\xAC, \xF0\x9F\xA6\x88  \xFF"));
    for (std::int32_t id = 0; id < tokenizer->vocabulary_size(); ++id) tokenizer->decode({&id, 1});
  });
  return 0;
}
