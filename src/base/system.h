#pragma once
#include <cstdint>
#include <string>

namespace megalodon {

// Memory of this process in bytes; 0 where the system does not say.
std::int64_t resident_bytes();
std::int64_t peak_resident_bytes();

// Memory of the machine in bytes.
std::int64_t memory_bytes();

// "Intel(R) Xeon(R) Platinum 8481C"; the architecture where the system gives no name.
std::string processor_name();

// Whether the processor multiplies bfloat16 by itself, faster than float32.
bool multiplies_bfloat16();

// Seconds on a clock that never goes back; only differences mean something.
double monotonic_seconds();

// Cores that this process may use.
int core_count();

}  // namespace megalodon
