#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <istream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::data {

// Reads JSON lines: an object a line with a member "text"; other members are ignored, blank lines skipped.
class JsonlReader {
 public:
  JsonlReader(std::istream& stream, std::string name) : stream_(stream), name_(std::move(name)) {}
  // The next text; false at the end. A bad line is a request error naming `name:line`.
  bool next(std::string& text);

 private:
  std::istream& stream_;
  std::string name_, line_;
  std::int64_t line_number_ = 0;
};

// The files that `inputs` stand for: files as given, folders recursively in the order of their paths without
// hidden files. Request errors: no such file, no file in a folder, compressed files.
std::vector<std::filesystem::path> list_documents(std::span<const std::filesystem::path> inputs);

// One document in pieces of at most a MiB, cut anywhere. last: the document ends with this (maybe empty)
// piece.
using DocumentSink = std::function<void(std::string_view piece, bool last)>;

// Hands over the documents of a file: each "text" of a .jsonl, or the whole file. `utf8`: a text that is not
// UTF-8 is a request error naming the byte. Memory is bounded by a MiB and the longest line of a .jsonl.
void read_documents(const std::filesystem::path& file, bool utf8, const DocumentSink& sink);

}  // namespace megalodon::data
