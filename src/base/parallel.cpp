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
  const std::int64_t team = std::min<std::int64_t>(omp_get_num_threads(), j.n / j.grain);
  const std::int64_t me = omp_get_thread_num();
  if (me >= team) return;
  // The first `longer` shares have one item more.
  const std::int64_t size = j.n / team, longer = j.n % team;
  const std::int64_t begin = me * size + std::min(me, longer);
  try {
    j.body(j.data, begin, begin + size + (me < longer ? 1 : 0));
  } catch (...) {
    const std::lock_guard guard(j.lock);
    if (!j.error) j.error = std::current_exception();
  }
}
}  // namespace
void parallel_for(std::int64_t n, std::int64_t grain, void (*body)(void*, std::int64_t, std::int64_t),
                  void* data) {
  if (n <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  if (n / grain < 2 || omp_get_max_threads() == 1 || omp_in_parallel()) return body(data, 0, n);
  Job job{n, grain, body, data, {}, nullptr};
  GOMP_parallel(share, &job, 0, 0);
  if (job.error) std::rethrow_exception(job.error);
}

int thread_count() {
  return omp_get_max_threads();
}

}  // namespace megalodon
