#include "base/log.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <utility>

#include "base/error.h"

namespace megalodon {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds redraw_interval{100};
constexpr std::chrono::seconds line_interval{10};

// stderr is shared by the process: its lines and the bar on it are kept apart here.
std::mutex stderr_lock;
Progress::Impl* shown_bar = nullptr;

void write_stderr(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
    if (written <= 0) return;  // nowhere to report it
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

std::string format(const char* pattern, double value) {
  std::array<char, 32> buffer;
  std::snprintf(buffer.data(), buffer.size(), pattern, value);
  return buffer.data();
}

// Three significant digits and the unit of the thousand.
std::string scaled(double value, const std::array<const char*, 5>& units) {
  std::size_t unit = 0;
  while (std::abs(value) >= 999.5 && unit + 1 < units.size()) {
    value /= 1000;
    ++unit;
  }
  return format(std::abs(value) < 999.5 ? "%.3g" : "%.0f", value) + units[unit];
}

constexpr char clear_line[] = "\r\x1b[K";

}  // namespace

struct Progress::Impl {
  std::string label, unit, text;
  std::int64_t total, done = 0, start = 0;
  Clock::time_point begin = Clock::now(), printed = begin;
  bool terminal = ::isatty(STDERR_FILENO) == 1;
  Impl* covered = nullptr;  // the bar that this one took the place of

  std::string line(bool finished) const {
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    return label + ": " + progress_text(start, done, total, unit, seconds, finished, text);
  }

  void draw() const {
    winsize size{};
    const bool known = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    const std::size_t width = known ? size.ws_col - 1u : 79u;
    std::string bar;
    if (total > 0) {
      constexpr std::size_t cells = 20;
      const double share = static_cast<double>(done) / static_cast<double>(total);
      const auto full = static_cast<std::size_t>(std::clamp(share, 0.0, 1.0) * cells);
      bar = "[" + std::string(full, '=') + std::string(cells - full, ' ') + "] ";
    }
    write_stderr(clear_line + (bar + line(false)).substr(0, width));
  }
};

Progress::Progress(std::string label, std::int64_t total, std::string unit)
    : impl_(std::make_unique<Impl>()) {
  impl_->label = std::move(label);
  impl_->unit = std::move(unit);
  impl_->total = total;
  const std::lock_guard guard(stderr_lock);
  if (!impl_->terminal) return;
  impl_->covered = std::exchange(shown_bar, impl_.get());
  impl_->draw();
}

Progress::~Progress() {
  const std::lock_guard guard(stderr_lock);
  write_stderr((impl_->terminal ? clear_line : "") + impl_->line(true) + "\n");
  if (shown_bar == impl_.get()) shown_bar = impl_->covered;
}

void Progress::start_at(std::int64_t done) {
  const std::lock_guard guard(stderr_lock);
  impl_->start = impl_->done = done;
  impl_->begin = Clock::now();
}

void Progress::update(std::int64_t done, std::string_view text) {
  const std::lock_guard guard(stderr_lock);
  impl_->done = done;
  impl_->text = text;
  const Clock::time_point now = Clock::now();
  if (impl_->terminal) {
    if (shown_bar != impl_.get() || now - impl_->printed < redraw_interval) return;
    impl_->draw();
  } else {
    if (now - impl_->printed < line_interval) return;
    write_stderr(impl_->line(false) + "\n");
  }
  impl_->printed = now;
}

namespace {

void log_line(std::string_view kind, std::string_view message) {
  const std::lock_guard guard(stderr_lock);
  write_stderr((shown_bar ? clear_line : "") + std::string(kind) + ": " + one_line(message) + "\n");
  if (shown_bar) shown_bar->draw();
}

}  // namespace

void log_note(std::string_view message) {
  log_line("note", message);
}

void log_warning(std::string_view message) {
  log_line("warning", message);
}

std::string progress_text(std::int64_t start, std::int64_t done, std::int64_t total, std::string_view unit,
                          double seconds, bool finished, std::string_view text) {
  std::string line = std::to_string(done);
  if (total > 0) line += "/" + std::to_string(total);
  line.append(" ").append(unit);
  if (total > 0) {
    line += format(" (%.0f%%)", std::floor(100.0 * static_cast<double>(done) / static_cast<double>(total)));
  }
  const double rate = seconds > 0 ? static_cast<double>(done - start) / seconds : 0;
  if (rate > 0) {
    line.append(", ").append(human_count(rate)).append(" ").append(unit).append("/s");
    if (!finished && total > done) {
      line += ", " + human_seconds(static_cast<double>(total - done) / rate) + " left";
    }
  }
  if (finished) line += ", " + human_seconds(seconds);
  if (!text.empty()) line.append(", ").append(text);
  return line;
}

std::string human_seconds(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0 || seconds > 1e15) return "?";
  if (seconds < 0.9995e-3) return format("%.3g us", seconds * 1e6);
  if (seconds < 0.9995) return format("%.3g ms", seconds * 1e3);
  if (seconds < 59.95) return format("%.1f s", seconds);
  const auto whole = static_cast<long long>(std::llround(seconds));
  const auto pair = [](long long high, const char* high_unit, long long low, const char* low_unit) {
    return std::to_string(high) + high_unit + (low < 10 ? " 0" : " ") + std::to_string(low) + low_unit;
  };
  if (whole < 3600) return pair(whole / 60, "m", whole % 60, "s");
  if (whole < 86400) return pair(whole / 3600, "h", whole % 3600 / 60, "m");
  return pair(whole / 86400, "d", whole % 86400 / 3600, "h");
}

std::string human_count(double count) {
  return std::isfinite(count) ? scaled(count, {"", "k", "M", "B", "T"}) : "?";
}

std::string human_bytes(double bytes) {
  return std::isfinite(bytes) ? scaled(bytes, {" B", " kB", " MB", " GB", " TB"}) : "?";
}

}  // namespace megalodon
