#include "data/prepare.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/random.h"
#include "data/documents.h"
#include "data/shard.h"

namespace megalodon::data {
namespace {

namespace fs = std::filesystem;

// Writes the documents of one split into shards of at most `shard_tokens` tokens.
class SplitWriter {
 public:
  SplitWriter(fs::path folder, std::string name, const Tokenizer& tokenizer, std::int64_t shard_tokens)
      : folder_(std::move(folder)),
        name_(std::move(name)),
        tokenizer_(tokenizer),
        encoder_(tokenizer),
        shard_tokens_(shard_tokens) {}

  void add(std::string_view piece) {
    document_bytes_ += static_cast<std::int64_t>(piece.size());
    ids_.clear();
    encoder_.push(piece, ids_);
    append();
  }

  // False where the document was empty and left out.
  bool end_document() {
    ids_.clear();
    encoder_.finish(ids_);
    const bool empty = document_bytes_ == 0;
    if (!empty && tokenizer_.end_of_document() >= 0) ids_.push_back(tokenizer_.end_of_document());
    append();
    summary_.documents += begun_;
    summary_.bytes += document_bytes_;
    document_bytes_ = 0;
    return std::exchange(begun_, false);
  }

  void finish() {
    if (!shard_) return;
    const std::int64_t tokens = shard_->tokens(), documents = shard_->documents();
    const std::string checksum = hex(shard_->commit());
    shard_.reset();
    listed_.push_back(
        {{"file", file_}, {"tokens", tokens}, {"documents", documents}, {"checksum", checksum}});
    ++summary_.shards;
  }

  const SplitSummary& summary() const { return summary_; }
  Json manifest() const {
    return {{"documents", summary_.documents},
            {"tokens", summary_.tokens},
            {"bytes", summary_.bytes},
            {"shards", listed_}};
  }

 private:
  void append() {
    std::span<const std::int32_t> ids = ids_;
    while (!ids.empty()) {
      if (!shard_) open_shard();
      if (!begun_) shard_->begin_document();
      begun_ = true;
      const auto room = static_cast<std::size_t>(shard_tokens_ - shard_->tokens());
      const auto part = ids.first(std::min(ids.size(), room));
      shard_->append(part);
      ids = ids.subspan(part.size());
      summary_.tokens += static_cast<std::int64_t>(part.size());
      if (shard_->tokens() == shard_tokens_) finish();
    }
  }

  void open_shard() {
    char number[16];
    std::snprintf(number, sizeof number, "-%05d.shard", static_cast<int>(summary_.shards));
    file_ = name_ + number;
    shard_ = std::make_unique<ShardWriter>(folder_ / file_, tokenizer_.vocabulary_size(),
                                           tokenizer_.fingerprint());
  }

  fs::path folder_;
  std::string name_, file_;
  const Tokenizer& tokenizer_;
  StreamEncoder encoder_;
  std::int64_t shard_tokens_, document_bytes_ = 0;
  bool begun_ = false;  // the document has tokens
  std::vector<std::int32_t> ids_;
  std::unique_ptr<ShardWriter> shard_;  // the one being written
  Json listed_ = Json::array();
  SplitSummary summary_;
};

// Draws one document out of each run of 1 / share consecutive ones.
class ValidationDraw {
 public:
  ValidationDraw(double share, std::uint64_t seed) : share_(share), seed_(seed) {}
  bool operator()(std::int64_t document) {
    if (share_ <= 0) return false;
    while (document >= end_) {
      const std::int64_t begin = end_;
      end_ = static_cast<std::int64_t>(std::ceil(static_cast<double>(++run_) / share_));
      const auto length = static_cast<std::uint64_t>(end_ - begin);
      const Purpose purpose = Purpose::data_order;
      drawn_ = begin + static_cast<std::int64_t>(
                           Random(seed_, purpose, static_cast<std::uint64_t>(run_)).below(length));
    }
    return document == drawn_;
  }

 private:
  double share_;
  std::uint64_t seed_;
  std::int64_t run_ = 0, end_ = 0, drawn_ = -1;
};

// A folder under a name of its own until commit() gives it its place; removed otherwise.
class NewFolder {
 public:
  explicit NewFolder(fs::path place) : place_(std::move(place)) {
    if (!place_.has_filename()) place_ = place_.parent_path();  // "out/"
    std::error_code error;
    if (fs::exists(place_, error) && !(fs::is_directory(place_, error) && fs::is_empty(place_, error))) {
      fail_request("output exists", place_.string(), "name a new folder or remove this one");
    }
    folder_ = place_;
    folder_ += ".partial-" + std::to_string(::getpid());
    if (!place_.parent_path().empty()) fs::create_directories(place_.parent_path(), error);
    fs::create_directory(folder_, error);
    if (error) fail_work("cannot create: " + error.message(), folder_.string(), "check the place for --out");
  }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;
  ~NewFolder() {
    std::error_code ignored;
    if (!folder_.empty()) fs::remove_all(folder_, ignored);
  }
  const fs::path& path() const { return folder_; }
  void commit() {
    rename_durably(folder_, place_);
    folder_.clear();
  }

 private:
  fs::path place_, folder_;
};

void check_options(const PrepareOptions& options) {
  if (!(options.validation_share >= 0 && options.validation_share <= 0.5)) {
    fail_request("a validation share of " + std::to_string(options.validation_share), "data prepare",
                 "choose one from 0 to 0.5");
  }
  if (options.validation_share > 0 && !options.validation_inputs.empty()) {
    fail_request("both a validation share and validation files", "data prepare", "give one of them");
  }
  if (options.shard_tokens < 1) {
    fail_request("shards of " + std::to_string(options.shard_tokens) + " tokens", "data prepare",
                 "choose at least 1");
  }
}

void check_split(const SplitSummary& split, const char* name, std::span<const fs::path> inputs,
                 const char* what_to_do) {
  if (split.tokens == 0) {
    const std::string where = inputs.empty() ? "data prepare" : inputs.front().string();
    fail_request(std::string("no text for ") + name, where, what_to_do);
  }
}

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer(std::string_view name, std::span<const fs::path> inputs) {
  if (name == "byte") return make_byte_tokenizer();
  if (name != "character") return load_tokenizer(fs::path(name));
  CharacterCollector collector;
  for (const fs::path& file : list_documents(inputs)) {
    read_documents(file, true, [&](std::string_view piece, bool) { collector.add(piece); });
  }
  return make_character_tokenizer(collector.characters());
}

PrepareSummary prepare(std::span<const fs::path> inputs, const Tokenizer& tokenizer, const fs::path& out,
                       const PrepareOptions& options) {
  check_options(options);
  const auto train_files = list_documents(inputs);
  std::vector<fs::path> validation_files;
  if (!options.validation_inputs.empty()) validation_files = list_documents(options.validation_inputs);

  NewFolder folder(out);
  SplitWriter train(folder.path(), "train", tokenizer, options.shard_tokens);
  SplitWriter validation(folder.path(), "validation", tokenizer, options.shard_tokens);
  PrepareSummary summary;
  std::int64_t bytes = 0, documents = 0;
  ValidationDraw draw(options.validation_share, options.seed);
  const bool utf8 = tokenizer.kind() != "byte";
  const auto tokenize = [&](const fs::path& file, bool is_validation) {
    bool drawn = draw(documents);
    read_documents(file, utf8, [&](std::string_view piece, bool last) {
      SplitWriter& split = is_validation || drawn ? validation : train;
      split.add(piece);
      bytes += static_cast<std::int64_t>(piece.size());
      if (options.progress) options.progress(bytes);
      if (!last) return;
      if (!split.end_document()) {
        ++summary.empty_documents;  // keeps its successor's draw: it does not count
        return;
      }
      drawn = draw(++documents);
    });
  };
  for (const fs::path& file : train_files) tokenize(file, false);
  for (const fs::path& file : validation_files) tokenize(file, true);
  train.finish();
  validation.finish();

  const bool wants_validation = options.validation_share > 0 || !validation_files.empty();
  check_split(train.summary(), "training", inputs, "give files that hold text");
  if (wants_validation) {
    check_split(validation.summary(), "validation",
                validation_files.empty() ? inputs : std::span<const fs::path>(options.validation_inputs),
                "give a larger share or validation files with text");
  }
  tokenizer.save(folder.path());
  Json manifest = {{"format", "megalodon-corpus"},
                   {"version", 1},
                   {"tokenizer",
                    {{"kind", tokenizer.kind()},
                     {"fingerprint", hex(tokenizer.fingerprint())},
                     {"vocabulary_size", tokenizer.vocabulary_size()}}},
                   {"splits", {{"train", train.manifest()}}}};
  if (wants_validation) manifest["splits"]["validation"] = validation.manifest();
  write_file_atomically(folder.path() / "manifest.json", manifest.dump(1) + "\n");
  folder.commit();
  summary.train = train.summary();
  summary.validation = validation.summary();
  return summary;
}

}  // namespace megalodon::data
