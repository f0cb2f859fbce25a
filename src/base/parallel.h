#pragma once
#include <cstdint>
#include <type_traits>

namespace megalodon {

// Runs body(begin, end) on contiguous shares of 0 .. n-1, at least `grain` items each, on torch's own OpenMP
// team. Needs neither -fopenmp nor torch headers: at::parallel_for is an inline template that runs on one
// thread, silently, in a file compiled without -fopenmp, and clang's -fopenmp would bring a second OpenMP
// runtime into the process. The shares depend on n, grain and the number of threads alone. An exception in
// `body` is rethrown here.
void parallel_for(std::int64_t n, std::int64_t grain, void (*body)(void*, std::int64_t, std::int64_t),
                  void* data);

template <class F>
void parallel_for(std::int64_t n, std::int64_t grain, F&& f) {
  using Body = std::remove_reference_t<F>;
  parallel_for(
      n, grain,
      [](void* body, std::int64_t begin, std::int64_t end) { (*static_cast<Body*>(body))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The size of the team that parallel_for uses.
int thread_count();

}  // namespace megalodon
