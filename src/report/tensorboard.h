#pragma once
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace megalodon::report {

// Seconds since 1970, as event files count time.
inline double wall_clock() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Writes one TensorBoard event file (`events.out.tfevents.SECONDS.megalodon.NNN`) in `folder`, which is made
// where it is missing. A later writer of the same folder starts a file whose name sorts behind those already
// there, the order in which TensorBoard reads them, even when the clock went back. Every event is one write()
// to the file: readers see it at once, and a killed process leaves at most one torn record, at the end, which
// TensorBoard skips. Not thread-safe. Errors are work errors that name the file.
class EventWriter {
 public:
  explicit EventWriter(const std::filesystem::path& folder);
  EventWriter(const EventWriter&) = delete;
  EventWriter& operator=(const EventWriter&) = delete;
  ~EventWriter();

  void add_scalar(std::string_view tag, double value, std::int64_t step, double wall_time = wall_clock());
  // Markdown, shown by TensorBoard's text page. Must be UTF-8.
  void add_text(std::string_view tag, std::string_view text, std::int64_t step,
                double wall_time = wall_clock());
  // For a resumed run, before its first event: readers discard what the earlier files say about `step` and
  // beyond, since those steps are done again.
  void discard_from(std::int64_t step, double wall_time = wall_clock());

  const std::filesystem::path& path() const { return path_; }

 private:
  void write_event(std::string_view payload);
  std::filesystem::path path_;
  int descriptor_ = -1;
};

}  // namespace megalodon::report
