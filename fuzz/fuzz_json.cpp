#include "base/json.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  fuzz::takes([&] {
    const Json value = parse_json(fuzz::text_of(data, size), "input");
    const std::string text = dump_json(value);
    fuzz::require(text.find('\n') == text.npos, "JSON is dumped as one line");
    fuzz::require(parse_json(text, "dump") == value, "JSON reads back as it was");
    for (const char* key : {"a", "model_type", "num_layers"}) {
      fuzz::takes([&] { json_member<bool>(value, key, "input"); });
      fuzz::takes([&] { json_member<std::int64_t>(value, key, "input"); });
      fuzz::takes([&] { json_member<double>(value, key, "input", 1.0); });
      fuzz::takes([&] { json_member<std::string>(value, key, "input"); });
    }
  });
  return 0;
}
