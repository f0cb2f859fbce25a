#include <vector>

#include "data/tokenizer.h"
#include "fuzz.h"

// tokenizer.json
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  fuzz::takes([&] {
    const auto tokenizer = data::parse_tokenizer_json(fuzz::text_of(data, size), "input");
    tokenizer->decode(tokenizer->encode(fuzz::text_of(data, size)));
    const auto first = tokenizer->kind() == "byte" ? 0 : data::kCharacterFirst;
    for (std::int32_t id = first; id < tokenizer->vocabulary_size(); ++id) {
      fuzz::require(tokenizer->encode(tokenizer->decode({&id, 1})) == std::vector{id}, "ids come back");
    }
  });
  return 0;
}
