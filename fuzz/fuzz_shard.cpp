#include <cstring>
#include <vector>

#include "base/hash.h"
#include "data/shard.h"
#include "fuzz.h"

// A token shard. The check sum of header and footer is made to fit, so that mutations reach what is behind
// it.
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  std::vector<std::byte> file(size);
  if (size > 0) std::memcpy(file.data(), data, size);
  if (size >= 104) {
    std::vector<std::byte> checked(file.begin(), file.begin() + 64);
    checked.insert(checked.end(), file.end() - 40, file.end() - 16);
    const std::uint64_t check = xxh3(checked);
    std::memcpy(file.data() + size - 16, &check, 8);
  }
  fuzz::takes([&] {
    const data::ShardLayout layout = data::parse_shard(file, "input");
    fuzz::require(64 + layout.tokens * layout.token_bytes <= layout.starts_offset,
                  "tokens end before the starts");
    fuzz::require(layout.starts_offset + layout.documents * 8 + 40 == size, "starts end at the footer");
    for (std::uint64_t i = 0; i < layout.documents; ++i) {
      std::uint64_t start;
      std::memcpy(&start, file.data() + layout.starts_offset + 8 * i, 8);
      fuzz::require(start < layout.tokens, "documents start within the tokens");
    }
  });
  return 0;
}
