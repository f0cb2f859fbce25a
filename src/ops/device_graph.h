#pragma once
#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace megalodon::ops {

// Work that a CUDA device does again and again on the same tensors: recorded once, then launched as a whole,
// which takes the CPU next to no time. Kernels of a decoding step that follow each other become one. What `f`
// launches must not depend on values on the device, nor may it wait for the device; it allocates from memory
// that the graph keeps.
class DeviceGraph {
 public:
  // Records f on a device; everything that it launches has run once before, in f() itself or otherwise, so
  // that libraries are set up. Nothing runs. What f throws is passed on. `neighbour` is a graph whose memory
  // this one uses too: neither runs beside the other, and neither leaves anything in that memory.
  static std::unique_ptr<DeviceGraph> record(at::Device device, const std::function<void()>& f,
                                             const DeviceGraph* neighbour = nullptr);
  virtual ~DeviceGraph() = default;
  // Launches it on the current stream.
  virtual void replay() = 0;
  // Kernels and copies that a replay launches.
  virtual std::size_t launches() const = 0;
};

}  // namespace megalodon::ops
