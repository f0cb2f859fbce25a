#pragma once
#include <c10/core/Device.h>

#include <functional>
#include <string>
#include <vector>

namespace megalodon::cli {

// What one run of something spent its time in.
struct ProfileEntry {
  std::string name;  // of a CUDA kernel, or of a torch operator on the CPU
  double seconds;    // on the CPU without the operators that it calls
  int64_t calls;
};

// Runs f once under torch's profiler: the longest first. With a path, what ran when is written there as a
// Chrome trace (chrome://tracing, Perfetto).
std::vector<ProfileEntry> profile(at::Device device, const std::function<void()>& f,
                                  const std::string& trace);

}  // namespace megalodon::cli
