#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/attention/kernel.h"

namespace megalodon::ops::cpu {

// Neighbouring queries of one row and one chunk, for the query heads that share a key head. Query i sees the
// first visible(i) of the task's keys.
struct Task {
  std::int64_t b, g;        // row, key head
  std::int64_t t, queries;  // the queries t .. t + queries - 1 of the call
  std::int64_t position;    // of the first query
  std::int64_t first;       // position of the first key

  std::int64_t visible(std::int64_t i) const { return position - first + i + 1; }
  std::int64_t keys() const { return visible(queries - 1); }
  // Query head h of the task: among the heads of the batch, and with query i among the rows of q, o [B L H].
  std::int64_t head(const AttentionSizes& s, std::int64_t h) const { return b * s.H + g * (s.H / s.Hkv) + h; }
  std::int64_t query(const AttentionSizes& s, std::int64_t i, std::int64_t h) const {
    return (b * s.L + t + i) * s.H + g * (s.H / s.Hkv) + h;
  }
  // Key i among the rows of k, v [B L Hkv]; negative offsets from the call's start lie in the cache.
  std::int64_t fresh_key(const AttentionSizes& s, std::int64_t i) const {
    return (b * s.L + offset(i)) * s.Hkv + g;
  }
  template <class T>
  const T* key(const AttentionSizes& s, const AttentionInputs<T>& in, std::int64_t i) const {
    return offset(i) < 0 ? in.cache_k + cached_key(s, i) * s.dk : in.k + fresh_key(s, i) * s.dk;
  }
  template <class T>
  const T* value(const AttentionSizes& s, const AttentionInputs<T>& in, std::int64_t i) const {
    return offset(i) < 0 ? in.cache_v + cached_key(s, i) * s.dv : in.v + fresh_key(s, i) * s.dv;
  }

 private:
  std::int64_t offset(std::int64_t i) const { return first + i - (position - t); }
  std::int64_t cached_key(const AttentionSizes& s, std::int64_t i) const {
    return (b * s.C + (first + i) % s.C) * s.Hkv + g;
  }
};

// All tasks of a call, of at most `longest` queries each.
inline std::vector<Task> tasks_of(const AttentionSizes& sizes, const std::int64_t* start,
                                  std::int64_t longest) {
  std::vector<Task> tasks;
  for (std::int64_t b = 0; b < sizes.B; ++b) {
    for (std::int64_t t = 0; t < sizes.L;) {
      const std::int64_t p = start[b] + t, c = sizes.chunk;
      const std::int64_t queries = std::min({sizes.L - t, longest, c > 0 ? c - p % c : sizes.L});
      const std::int64_t first = c > 0 ? std::max<std::int64_t>(0, p / c - sizes.previous_chunks) * c : 0;
      for (std::int64_t g = 0; g < sizes.Hkv; ++g) tasks.push_back({b, g, t, queries, p, first});
      t += queries;
    }
  }
  return tasks;
}

// The tasks of sequences: a position is that in its own.
inline std::vector<Task> tasks_of(const AttentionSizes& sizes, const AttentionBorders& borders,
                                  std::int64_t longest) {
  std::vector<Task> tasks;
  for (std::int64_t i = 0; i < borders.sequences; ++i) {
    const std::int64_t begin = borders.border[i], end = borders.border[i + 1];
    for (std::int64_t t = begin; t < end; t += longest) {
      for (std::int64_t g = 0; g < sizes.Hkv; ++g)
        tasks.push_back({0, g, t, std::min(longest, end - t), t - begin, 0});
    }
  }
  return tasks;
}

// Uninitialised buffers, 64-byte aligned, that the tasks of a thread use one after the other: the n-th take()
// after a reset() gives the n-th buffer.
class Workspace {
 public:
  void reset() { next_ = 0; }
  template <class T>  // of 32 bits
  T* take(std::int64_t count) {
    static_assert(sizeof(T) == sizeof(std::uint32_t));
    if (next_ == buffers_.size()) buffers_.emplace_back();
    auto& buffer = buffers_[next_++];
    if (buffer.count < count) {
      buffer.memory.reset(static_cast<std::uint32_t*>(
          ::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{kAlignment})));
      buffer.count = count;
    }
    return reinterpret_cast<T*>(buffer.memory.get());
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(std::uint32_t* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  struct Buffer {
    std::unique_ptr<std::uint32_t, Free> memory;
    std::int64_t count = 0;
  };
  std::vector<Buffer> buffers_;
  std::size_t next_ = 0;
};

}  // namespace megalodon::ops::cpu
