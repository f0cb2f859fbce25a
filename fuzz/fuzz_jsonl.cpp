#include <sstream>
#include <string>

#include "data/documents.h"
#include "data/utf8.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  std::istringstream stream{std::string(fuzz::text_of(data, size))};
  fuzz::takes([&] {
    data::JsonlReader reader(stream, "input");
    for (std::string text; reader.next(text);) {
      fuzz::require(data::utf8_first_invalid(text) == std::string::npos, "texts are UTF-8");
    }
  });
  return 0;
}
