#include "data/documents.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>

#include "base/error.h"
#include "base/json.h"
#include "data/utf8.h"

namespace megalodon::data {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kPiece = std::size_t{1} << 20;

std::ifstream open(const fs::path& file) {
  errno = 0;
  std::ifstream stream(file, std::ios::binary);
  if (!stream) {
    fail_request(std::string("cannot read: ") + std::strerror(errno), file.string(),
                 "check the path and its permissions");
  }
  return stream;
}

void refuse_compressed(const fs::path& file) {
  constexpr std::array<std::string_view, 6> compressed{".gz", ".zst", ".xz", ".bz2", ".zip", ".lz4"};
  if (std::ranges::find(compressed, file.extension().string()) != compressed.end()) {
    fail_request("compressed file", file.string(), "unpack it first");
  }
}

bool is_hidden(const fs::path& path) {
  return path.filename().string().starts_with('.');
}

std::vector<fs::path> list_folder(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code error, ignored;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (is_hidden(it->path())) {
      if (it->is_directory(ignored)) it.disable_recursion_pending();
    } else if (it->is_regular_file(ignored)) {
      refuse_compressed(it->path());
      files.push_back(it->path());
    }
  }
  if (error)
    fail_request("cannot read: " + error.message(), folder.string(), "check the folder's permissions");
  if (files.empty()) fail_request("no file in this folder", folder.string(), "give text or .jsonl files");
  std::ranges::sort(files);
  return files;
}

// Finds the first byte that is not UTF-8 in a text given in pieces.
class Utf8Check {
 public:
  explicit Utf8Check(const fs::path& file) : file_(file) {}
  void add(std::string_view piece, bool last) {
    std::string joined;
    if (!pending_.empty()) {
      joined = pending_ + std::string(piece);
      piece = joined;
    }
    const std::size_t complete = last ? piece.size() : utf8_complete_prefix(piece);
    const std::size_t invalid = utf8_first_invalid(piece.substr(0, complete));
    if (invalid != std::string_view::npos) {
      fail_request("not UTF-8 at byte " + std::to_string(offset_ + invalid), file_.string(),
                   "convert it to UTF-8, or use the byte tokenizer");
    }
    offset_ += complete;
    pending_ = piece.substr(complete);
  }

 private:
  const fs::path& file_;
  std::string pending_;
  std::size_t offset_ = 0;
};

void read_text(const fs::path& file, bool utf8, const DocumentSink& sink) {
  std::ifstream stream = open(file);
  Utf8Check check(file);
  std::string buffer(kPiece, '\0');
  for (bool last = false; !last;) {
    stream.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    const std::string_view piece(buffer.data(), static_cast<std::size_t>(stream.gcount()));
    if (stream.bad()) fail_request("cannot read", file.string(), "check that it is a readable file");
    last = stream.eof();
    if (utf8) check.add(piece, last);
    sink(piece, last);
  }
}

void read_jsonl(const fs::path& file, const DocumentSink& sink) {
  std::ifstream stream = open(file);
  JsonlReader reader(stream, file.string());
  for (std::string text; reader.next(text);) {
    std::string_view rest = text;
    for (; rest.size() > kPiece; rest.remove_prefix(kPiece)) sink(rest.substr(0, kPiece), false);
    sink(rest, true);
  }
}

}  // namespace

bool JsonlReader::next(std::string& text) {
  while (std::getline(stream_, line_)) {
    ++line_number_;
    if (line_.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = name_ + ":" + std::to_string(line_number_);
    Json object = parse_json(line_, where);
    if (!object.is_object()) {
      fail_request("a line that is not a JSON object", where,
                   "write one object a line with a member \"text\"");
    }
    text = json_member<std::string>(object, "text", where);
    return true;
  }
  if (stream_.bad()) fail_request("cannot read", name_, "check that it is a readable file");
  return false;
}

std::vector<fs::path> list_documents(std::span<const fs::path> inputs) {
  std::vector<fs::path> files;
  for (const auto& input : inputs) {
    std::error_code error;
    const fs::file_status status = fs::status(input, error);
    if (status.type() == fs::file_type::not_found) {
      fail_request("no such file or folder", input.string(), "give text or .jsonl files, or folders of them");
    }
    if (error) fail_request("cannot read: " + error.message(), input.string(), "check its permissions");
    if (fs::is_directory(status)) {
      const auto found = list_folder(input);
      files.insert(files.end(), found.begin(), found.end());
    } else {
      refuse_compressed(input);
      files.push_back(input);
    }
  }
  if (files.empty()) fail_request("no input", "data", "give text or .jsonl files, or folders of them");
  return files;
}

void read_documents(const fs::path& file, bool utf8, const DocumentSink& sink) {
  if (file.extension() == ".jsonl") {
    read_jsonl(file, sink);
  } else {
    read_text(file, utf8, sink);
  }
}

}  // namespace megalodon::data
