#include "base/parallel.h"
#include <algorithm>
#include <exception>
#include <mutex>
extern "C" {
void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
int omp_get_max_threads();
int omp_in_parallel();
}
namespace megalodon {
namespace {
struct Job {
  std::int64_t n, grain;
  void (*body)(void*, std::int64_t, std::int64_t);
  void* data;
  std::mutex lock;
  std::exception_ptr error;
};
void share(void* p) {
  auto& j = *static_cast<Job*>(p);
  const std::int64_t team = std::min<std::int64_t>(omp_get_num_threads(), (j.n + j.grain - 1) / j.grain),
                     me = omp_get_thread_num();
  if (me >= team) return;
  const std::int64_t chunk = (j.n + team - 1) / team, begin = me * chunk, end = std::min(j.n, begin + chunk);
  if (begin >= end) return;
  try {
    j.body(j.data, begin, end);
  } catch (...) {
    const std::lock_guard guard(j.lock);
    if (!j.error) j.error = std::current_exception();
  }
}
}  // namespace
void parallel_for(std::int64_t n, std::int64_t grain, void (*body)(void*, std::int64_t, std::int64_t),
                  void* data) {
  if (n <= 0) return;
  if (n <= grain || omp_get_max_threads() == 1 || omp_in_parallel()) return body(data, 0, n);
  Job job{n, std::max<std::int64_t>(grain, 1), body, data, {}, nullptr};
  GOMP_parallel(share, &job, 0, 0);
  if (job.error) std::rethrow_exception(job.error);
}

int thread_count() {
  return omp_get_max_threads();
}

}  // namespace megalodon
