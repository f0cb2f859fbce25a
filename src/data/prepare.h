#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace megalodon::data {

struct PrepareOptions {
  // Documents that go to the split "validation": this share of all (one in each run of 1 / share documents,
  // drawn by `seed`), or those of `validation_inputs`; not both.
  double validation_share = 0;  // 0 .. 0.5
  std::vector<std::filesystem::path> validation_inputs;
  std::uint64_t seed = 0;
  std::int64_t shard_tokens = std::int64_t{1} << 28;  // a shard's most
  std::function<void(std::int64_t bytes)> progress;   // called with the text bytes read so far
};

struct SplitSummary {
  std::int64_t documents = 0, tokens = 0, bytes = 0, shards = 0;  // bytes: of text
};

struct PrepareSummary {
  SplitSummary train, validation;
  std::int64_t empty_documents = 0;  // left out
};

// "byte", "character" (of the code points of `inputs`) or a path for load_tokenizer().
std::unique_ptr<Tokenizer> open_tokenizer(std::string_view name,
                                          std::span<const std::filesystem::path> inputs);

// Tokenizes text files (each a document), .jsonl files (each line's "text") and folders of them into token
// shards, manifest.json and a copy of the tokenizer in the new folder `out`, which appears whole or not at
// all. The end-of-document id follows each document where the tokenizer has one. Memory is bounded whatever
// the size of the input (documents.h). The files depend on the inputs, the tokenizer and the options alone.
PrepareSummary prepare(std::span<const std::filesystem::path> inputs, const Tokenizer& tokenizer,
                       const std::filesystem::path& out, const PrepareOptions& options = {});

}  // namespace megalodon::data
