// Stands in for sentencepiece_tokenizer.cpp in builds with MEGALODON_SENTENCEPIECE=OFF.
#include "base/error.h"
#include "data/tokenizer.h"

namespace megalodon::data {

std::unique_ptr<Tokenizer> parse_sentencepiece(std::string_view, std::string_view where) {
  fail_request("this build has no SentencePiece", where,
               "build with -DMEGALODON_SENTENCEPIECE=ON, or use a byte or character tokenizer");
}

}  // namespace megalodon::data
