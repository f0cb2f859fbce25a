#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace megalodon {

// One line on stderr, whole, behind any progress bar: `note: ...` or `warning: ...`.
void log_note(std::string_view message);
void log_warning(std::string_view message);

// Progress of long work on stderr: a bar that redraws itself on a terminal, elsewhere a plain line every 10
// seconds and at the end. Shows done/total (`total` 0: unknown), rate, time left and a free text ("loss
// 2.31"). update() may be called from any thread, as often as one likes. One bar at a time is on the
// terminal: the last one made.
class Progress {
 public:
  Progress(std::string label, std::int64_t total, std::string unit);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();  // ends the line

  void update(std::int64_t done, std::string_view text = {});
  // Where the work resumed: excluded from the rate.
  void start_at(std::int64_t done);

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

// What a progress line says after its label: "30/120 steps (25%), 2.5 steps/s, 36.0 s left, loss 2.31".
// `seconds` were spent on the work beyond `start`; once it is finished they stand in place of the time left.
std::string progress_text(std::int64_t start, std::int64_t done, std::int64_t total, std::string_view unit,
                          double seconds, bool finished, std::string_view text);

// "3m 05s", "2h 10m", "850 ms"; "1.53M", "12.4k"; "1.2 GB".
std::string human_seconds(double seconds);
std::string human_count(double count);
std::string human_bytes(double bytes);

}  // namespace megalodon
