#pragma once
#include "ops/cuda_device.h"
#include "ops/cuda_hopper.h"
#include "ops/step_program/phases.h"

namespace megalodon::ops::cuda::step_program {

// Of the computing warps.
__device__ inline void sync() {
  named_wait(1, kThreads);
}

// What phases hand over. A read succeeds when the number is there; several are asked for at once, again and
// again, since each takes a trip to the second cache.
class Words {
 public:
  __device__ explicit Words(unsigned tag) : tag_(tag & 0xffff) {}

  // 8 neighbours, from words if there are some, else from plain numbers, which are there.
  __device__ bool read_8(const Word* words, const Bfloat16* plain, std::int64_t at, uint4& to) const {
    if (words == nullptr) {
      to = read_pack(plain + at);
      return true;
    }
    const uint4 a = load_4(words + at), b = load_4(words + at + 4);
    to = {pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w)};
    return is_new(a.x) & is_new(a.y) & is_new(a.z) & is_new(a.w) & is_new(b.x) & is_new(b.y) & is_new(b.z) &
           is_new(b.w);
  }
  __device__ bool read(const Word* words, const Bfloat16* plain, std::int64_t at, float& to) const {
    const Word word = ask(words, plain, at);
    to = value(word);
    return is_new(word);
  }
  // The same in steps, for who has something to do until the answer comes.
  __device__ Word ask(const Word* words, const Bfloat16* plain, std::int64_t at) const {
    if (words == nullptr)
      return Word{__ldcg(reinterpret_cast<const unsigned short*>(plain + at))} << 16 | tag_;
    Word word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(words + at) : "memory");
    return word;
  }
  __device__ bool is_new(Word word) const { return (word & 0xffff) == tag_; }
  __device__ static float value(Word word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ bool read(const FloatWord* word, float& to) const {
    FloatWord found;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
    to = __uint_as_float(static_cast<Word>(found >> 32));
    return static_cast<Word>(found) == tag_;
  }
  __device__ void write(Word* words, Bfloat16* plain, std::int64_t at, Bfloat16 value) const {
    if (words != nullptr)
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
