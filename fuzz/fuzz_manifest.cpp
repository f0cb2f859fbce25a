#include "data/corpus.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  fuzz::takes([&] {
    for (const auto& shard : data::parse_manifest(fuzz::text_of(data, size), "train", "input")) {
      fuzz::require(shard.file.find('/') == std::string::npos, "shards lie in the folder");
    }
  });
  return 0;
}
