#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>

namespace megalodon {

// `text` for a line that a person reads: line breaks and tabs are spaces, other control characters '?', so
// that names out of a hostile file neither forge lines nor steer the terminal.
std::string one_line(std::string_view text);

// One line of the beginning of `text`, 60 bytes at most: what is out of a file may be of any length.
std::string excerpt(std::string_view text);

// "a, b, c": the names to choose from, for messages.
template <class Names>
std::string joined(const Names& names) {
  std::string all;
  for (const auto& name : names) all.append(all.empty() ? "" : ", ").append(name);
  return all;
}

// An error that a person reads: one line, `WHAT (WHERE): WHAT TO DO`.
// The command line prints it behind `error: ` and exits with the code of its kind.
class Error : public std::runtime_error {
 public:
  enum class Kind : int {
    work = 1,
    request = 2
  };  // the exit code: the work failed, or the request was wrong

  Error(Kind kind, std::string_view what, std::string_view where, std::string_view what_to_do);
  Kind kind() const { return kind_; }

 private:
  Kind kind_;
};

// The request was wrong: bad arguments, configuration, or input files (exit code 2).
[[noreturn]] void fail_request(std::string_view what, std::string_view where, std::string_view what_to_do);
// A valid request could not be carried out: disk full, run in use, no progress possible (exit code 1).
[[noreturn]] void fail_work(std::string_view what, std::string_view where, std::string_view what_to_do);

// The candidate nearest to `name` by edit distance, or "" where none is near; for "did you mean" hints.
template <class Names>
std::string nearest_name(std::string_view name, const Names& candidates);

std::size_t edit_distance(std::string_view a, std::string_view b);

template <class Names>
std::string nearest_name(std::string_view name, const Names& candidates) {
  std::string best;
  std::size_t best_distance = name.size() / 2 + 2;
  for (const auto& candidate : candidates) {
    // The distance is at least the difference in length: names of megabytes cost nothing.
    const std::size_t longer = std::max(name.size(), std::string_view(candidate).size());
    const std::size_t shorter = std::min(name.size(), std::string_view(candidate).size());
    if (longer - shorter >= best_distance) continue;
    const std::size_t distance = edit_distance(name, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

}  // namespace megalodon
