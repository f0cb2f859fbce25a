#include "ops/simd_dispatch.h"

#if HWY_ARCH_X86 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Whether the processor has AMX with bfloat16, and Linux, which wants to be asked, lets this process use it.
bool may_use_tiles() {
#if HWY_ARCH_X86 && defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBfloat16) != 0 && (d & kTiles) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::string_view wanted_level() {
  const char* wanted = std::getenv("MEGALODON_SIMD");
  return wanted != nullptr ? wanted : "";
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = [] {
    const auto name = wanted_level();
    const SimdLevel limit = name == "baseline" ? SimdLevel::baseline
                            : name == "avx2"   ? SimdLevel::avx2
                                               : SimdLevel::avx512;
    return std::min(limit, processor_level());
  }();
  return level;
}

Bfloat16Products bfloat16_products() {
  static const Bfloat16Products products = [] {
#if HWY_ARCH_X86
    if (simd_level() == SimdLevel::avx512 && __builtin_cpu_supports("avx512bf16"))
      return wanted_level() != "avx512" && may_use_tiles() ? Bfloat16Products::tiles
                                                           : Bfloat16Products::pairs;
#endif
    return Bfloat16Products::widened;
  }();
  return products;
}

bool mkl_takes_avx2() {
#if HWY_ARCH_X86
  return simd_level() == SimdLevel::avx512 && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace megalodon::ops
