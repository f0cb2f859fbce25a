#pragma once
#include <ATen/ATen.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

// Shared by the operators' tests.
namespace megalodon::ops::testing {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

// Where the tests run: $MEGALODON_TEST_DEVICE, or the CPU.
at::Device device();

// On the device of `x`, for what a test gives besides its inputs.
at::Tensor beside(const at::Tensor& x, const at::Tensor& given);

// Standard normal values, a function of the running test and the draws before.
at::Tensor random(at::IntArrayRef shape, at::ScalarType type = at::kFloat);

// ||a - b|| / ||b|| in float64 (complex128 for complex); the norm of a where b is zero.
double relative_error(const at::Tensor& a, const at::Tensor& b);

// `fast` on `inputs` agrees with `reference` on the inputs in float64: outputs, and the gradients of every
// floating input under random upstream gradients. The bound is `tolerance` (0: 2e-6 for float32, 1.5e-2 for
// bfloat16), norm-wise, and wider for tensors of fewer than 256 numbers. New memory is filled with NaN while
// `fast` runs, so that what a kernel leaves unwritten shows. The reference runs on the CPU.
void expect_agreement(const Function& fast, const Function& reference, const Tensors& inputs,
                      double tolerance = 0);

// The gradients of `f` at float64 (or complex128) inputs meet central differences, for outputs real or
// complex.
void expect_gradients(const Function& f, const Tensors& inputs);

// NaN in all new memory while it lives.
class PoisonedMemory {
 public:
  PoisonedMemory();
  ~PoisonedMemory();
  PoisonedMemory(const PoisonedMemory&) = delete;
  PoisonedMemory& operator=(const PoisonedMemory&) = delete;
};

// Counts the bytes of tensors that are made on its thread while it lives, through what torch reports to its
// profiler; one at a time.
class CountedMemory {
 public:
  CountedMemory();
  int64_t now() const;   // alive
  int64_t peak() const;  // the most that were alive at once

 private:
  struct Counter;
  std::shared_ptr<Counter> counter_;
  c10::DebugInfoGuard guard_;
};

// `f` throws a c10::Error whose message contains `text`.
void expect_error(const std::function<void()>& f, const std::string& text);

}  // namespace megalodon::ops::testing
