#pragma once
#include <cuda_runtime.h>

#include <cstdint>

// Hopper's barriers in shared memory, on which copies by the copy engine (TMA) arrive too.
namespace megalodon::ops::cuda {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// In shared memory. Its phases are numbered from 0; a phase ends when `arrivals` have come and the bytes that
// are expected.
struct Barrier {
  std::uint64_t state;

  __device__ void start(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals)
                 : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  // Until the phase is over; of the phase before the first it is.
  __device__ void wait(int phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(shared_address(this)),
        "r"(phase & 1)
        : "memory");
  }
};

// After barriers were started, by the thread that did so, which may order copies then; the others use them
// after a __syncthreads.
__device__ inline void barriers_are_started() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Two numbers to an address in another block of the cluster (address_in_block), whose arrival its barrier at
// such an address counts as that of 8 bytes.
__device__ inline void send_to_block(std::uint32_t to, float a, float b, std::uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
      "f"(a), "f"(b), "r"(barrier)
      : "memory");
}

// What ordinary stores wrote is seen by copies that are started after a barrier.
__device__ inline void written_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Copies from shared memory, by one thread: started, in groups that are committed, until all but the last
// `kLeft` groups have read it.
__device__ inline void commit_copies_back() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kLeft = 0>
__device__ inline void wait_for_copies_back() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

}  // namespace megalodon::ops::cuda
