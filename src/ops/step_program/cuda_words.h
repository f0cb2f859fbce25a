#pragma once
#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/step_program/phases.h"

namespace megalodon::ops::cuda::step_program {

// Of the computing warps.
__device__ inline void sync() {
  named_wait(1, kThreads);
}

// What phases hand over. Who reads asks for all that it needs, again and again until all of it is there, and
// looks at none of it before it has asked for the rest, since each answer is a trip to the second cache.
class Words {
 public:
  struct Eight {
    uint4 low, high;
  };

  __device__ explicit Words(unsigned tag) : tag_(tag & 0xffff) {}

  __device__ static Word ask(const Word* word) {
    Word found;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
    return found;
  }
  __device__ static Eight ask_8(const Word* words) { return {load_4(words), load_4(words + 4)}; }
  __device__ static FloatWord ask(const FloatWord* word) {
    FloatWord found;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
    return found;
  }
  __device__ bool is_new(Word word) const { return (word & 0xffff) == tag_; }
  __device__ bool is_new(const Eight& w) const {
    return is_new(w.low.x) & is_new(w.low.y) & is_new(w.low.z) & is_new(w.low.w) & is_new(w.high.x) &
           is_new(w.high.y) & is_new(w.high.z) & is_new(w.high.w);
  }
  __device__ bool is_new(FloatWord word) const { return static_cast<Word>(word) == tag_; }
  __device__ static float value(Word word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ static uint4 value(const Eight& w) {
    return {pair(w.low.x, w.low.y), pair(w.low.z, w.low.w), pair(w.high.x, w.high.y),
            pair(w.high.z, w.high.w)};
  }
  __device__ static float value(FloatWord word) { return __uint_as_float(static_cast<Word>(word >> 32)); }
  // In plain memory too, unless that is null.
  __device__ void write(Word* words, Bfloat16* plain, std::int64_t at, Bfloat16 value) const {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(words + at), "r"(Word{value.bits} << 16 | tag_)
                 : "memory");
    if (plain != nullptr) plain[at] = value;
  }
  __device__ void write(FloatWord* word, float value) const {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word),
                 "l"(FloatWord{__float_as_uint(value)} << 32 | tag_)
                 : "memory");
  }

 private:
  __device__ static Word pair(Word low, Word high) { return __byte_perm(low, high, 0x7632); }
  __device__ static uint4 load_4(const Word* from) {
    uint4 w;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(from)
                 : "memory");
    return w;
  }

  Word tag_;
};

// Parameters, on their way from here on: left to itself the compiler asks for them when they are needed.
__device__ inline float read_parameter(const float* from) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}
__device__ inline void read_parameters(const float* from, float (&to)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j += 4)
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[j]), "=f"(to[j + 1]), "=f"(to[j + 2]), "=f"(to[j + 3])
                 : "l"(from + j));
}

}  // namespace megalodon::ops::cuda::step_program
