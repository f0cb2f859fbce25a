#include "cli/profile.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "ops/device.h"

namespace megalodon::cli {
namespace {
namespace profiler = torch::autograd::profiler;
using Event = const profiler::KinetoEvent*;

double seconds_of(Event e) {
  return static_cast<double>(e->durationNs()) * 1e-9;
}

// The time of each event of a CPU less that of the events inside it: those of a thread lie inside or beside
// each other.
std::map<Event, double> own_seconds(std::vector<Event> events) {
  std::ranges::sort(events, {}, [](Event e) {
    return std::tuple(e->startThreadId(), e->startNs(), -static_cast<int64_t>(e->durationNs()));
  });
  std::map<Event, double> own;
  std::vector<Event> around;
  for (const auto e : events) {
    while (!around.empty() &&
           (around.back()->startThreadId() != e->startThreadId() || around.back()->endNs() <= e->startNs()))
      around.pop_back();
    if (!around.empty()) own[around.back()] -= seconds_of(e);
    own[e] += seconds_of(e);
    around.push_back(e);
  }
  return own;
}

}  // namespace

std::vector<ProfileEntry> profile(at::Device device, const std::function<void()>& f,
                                  const std::string& trace) {
  const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
  const auto activity = device.is_cuda() ? profiler::ActivityType::CUDA : profiler::ActivityType::CPU;
  setenv("KINETO_LOG_LEVEL", "99", /*overwrite=*/0);  // without a GPU it would report that as an error
  ops::synchronize(device);
  profiler::prepareProfiler(config, {activity});
  profiler::enableProfiler(config, {activity},
                           {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION});
  f();
  ops::synchronize(device);
  const auto result = profiler::disableProfiler();
  if (!trace.empty()) result->save(trace);

  std::vector<Event> events;
  for (const auto& event : result->events())
    if (event.deviceType() == device.type()) events.push_back(&event);
  std::map<std::string, ProfileEntry> by_name;
  const auto own = device.is_cuda() ? std::map<Event, double>() : own_seconds(events);
  for (const auto event : events) {
    auto& entry = by_name.try_emplace(event->name(), ProfileEntry{event->name(), 0, 0}).first->second;
    entry.seconds += device.is_cuda() ? seconds_of(event) : own.at(event);
    ++entry.calls;
  }
  std::vector<ProfileEntry> entries;
  for (auto& [name, entry] : by_name) entries.push_back(std::move(entry));
  std::ranges::sort(entries, std::greater{}, &ProfileEntry::seconds);
  return entries;
}

}  // namespace megalodon::cli
