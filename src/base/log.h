#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace megalodon {

// One line on stderr, whole, behind any progress bar: `note: ...` or `warning: ...`.
void log_note(std::string_view message);
void log_warning(std::string_view message);

// Progress of long work on stderr: a bar that redraws itself on a terminal, elsewhere a plain line every few
// seconds (10) and at the end. Shows done/total, rate, time left and a free text ("loss 2.31").
class Progress {
 public:
  Progress(std::string label, std::int64_t total, std::string unit);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();  // ends the line

  void update(std::int64_t done, std::string_view text = {});
  // Where the work resumed: excluded from the rate.
  void start_at(std::int64_t done);

 private:
  struct Impl;
  Impl* impl_;
};

// "3m 05s", "2h 10m", "850 ms"; "1.53M", "12.4k"; "1.2 GB".
std::string human_seconds(double seconds);
std::string human_count(double count);
std::string human_bytes(double bytes);

}  // namespace megalodon
