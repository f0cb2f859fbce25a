#pragma once
#include <array>
#include <cstdint>

namespace megalodon {

// What a stream of random numbers is for. Streams of different purpose never overlap.
enum class Purpose : std::uint32_t { initialisation = 1, data_order, dropout, sampling, tasks, test };

// Philox4x32-10 (Salmon et al., 2011): four random words that are a function of key and counter alone.
std::array<std::uint32_t, 4> philox(std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high);

// The key of a stream: a function of (seed, purpose) alone.
std::uint64_t random_key(std::uint64_t seed, Purpose purpose);

// A stream of random numbers keyed by (seed, purpose, step): any step can be replayed without the ones before
// it. Not thread-safe; make one for each use.
class Random {
 public:
  Random(std::uint64_t seed, Purpose purpose, std::uint64_t step);

  std::uint32_t next();                  // uniform over all 32-bit words
  double uniform();                      // in [0, 1), 53 bits
  std::uint64_t below(std::uint64_t n);  // uniform over 0 .. n-1, without bias; n >= 1
  double normal();                       // mean 0, variance 1 (Box-Muller)

 private:
  std::uint64_t key_, step_, block_ = 0;
  std::array<std::uint32_t, 4> words_{};
  unsigned used_ = 4;
};

}  // namespace megalodon
