#include "ops/simd_dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace megalodon::ops {
namespace {

SimdLevel processor_level() {
#if HWY_ARCH_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd");
  return avx512 ? SimdLevel::avx512 : avx2 ? SimdLevel::avx2 : SimdLevel::baseline;
#else
  return SimdLevel::baseline;
#endif
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = [] {
    const char* wanted = std::getenv("MEGALODON_SIMD");
    const std::string_view name = wanted != nullptr ? wanted : "";
    const SimdLevel limit = name == "baseline" ? SimdLevel::baseline
                            : name == "avx2"   ? SimdLevel::avx2
                                               : SimdLevel::avx512;
    return std::min(limit, processor_level());
  }();
  return level;
}

}  // namespace megalodon::ops
