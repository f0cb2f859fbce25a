#include "ops/testing.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Allocator.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>

#include "base/hash.h"
#include "ops/device.h"

namespace megalodon::ops::testing {
namespace {

bool is_floating(const at::Tensor& x) {
  return x.is_floating_point() || x.is_complex();
}

at::Tensor in_double(const at::Tensor& x) {
  return x.is_complex() ? x.to(at::kComplexDouble) : x.is_floating_point() ? x.to(at::kDouble) : x;
}

Tensors leaves(const Tensors& inputs) {
  Tensors out;
  for (const auto& x : inputs) {
    out.push_back(is_floating(x) ? x.detach().clone().set_requires_grad(true) : x);
  }
  return out;
}

Tensors differentiable(const Tensors& tensors) {
  Tensors out;
  for (const auto& x : tensors) {
    if (x.requires_grad()) out.push_back(x);
  }
  return out;
}

Tensors gradients(const Tensors& outputs, const Tensors& inputs, const Tensors& upstream) {
  Tensors roots, seeds;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].requires_grad()) continue;
    roots.push_back(outputs[i]);
    seeds.push_back(upstream[i].to(outputs[i].options().requires_grad(false)));
  }
  return torch::autograd::grad(roots, differentiable(inputs), seeds, {}, false, /*allow_unused=*/false);
}

}  // namespace

PoisonedMemory::PoisonedMemory() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
}
PoisonedMemory::~PoisonedMemory() {
  at::globalContext().setDeterministicAlgorithms(false, false);
}

namespace {

at::Device wanted_device() {
  const char* const wanted = std::getenv("MEGALODON_TEST_DEVICE");
  return open_device(wanted != nullptr ? wanted : "cpu");
}

// Before any test asks torch about CUDA. A test program that cannot open its device may end here.
// NOLINTNEXTLINE(bugprone-throwing-static-initialization)
const at::Device chosen_device = wanted_device();

}  // namespace

at::Device device() {
  return chosen_device;
}

at::Tensor beside(const at::Tensor& x, const at::Tensor& given) {
  return given.to(x.device());
}

namespace {

// Of the running test and the draws that it made, so that neither order nor choice of tests changes its
// input.
uint64_t next_seed() {
  static std::string last;
  static uint64_t draws = 0;
  const auto* const test = ::testing::UnitTest::GetInstance()->current_test_info();
  const std::string name = test == nullptr ? "" : std::string(test->test_suite_name()) + "." + test->name();
  if (name != last) draws = 0;
  last = name;
  return xxh3(name) + ++draws;
}

}  // namespace

at::Tensor random(at::IntArrayRef shape, at::ScalarType type) {
  auto generator = at::detail::createCPUGenerator(next_seed());
  const bool complex = at::isComplexType(type);
  const auto x = at::randn(shape, generator, complex ? at::kComplexDouble : at::kDouble);
  return x.to(type).to(device());
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const auto type = b.is_complex() ? at::kComplexDouble : at::kDouble;
  const auto reference = b.to(type).cpu();
  const double norm = at::linalg_vector_norm(reference).item<double>();
  const double error = at::linalg_vector_norm(a.to(type).cpu() - reference).item<double>();
  return norm > 0 ? error / norm : error;
}

namespace {

// Of few numbers, which may be small differences of large ones, a bound by their own norm says little.
double bound(double tolerance, const at::Tensor& want) {
  constexpr double enough = 256;
  const auto numbers = static_cast<double>(std::max<int64_t>(want.numel(), 1));
  return numbers < enough ? tolerance * std::sqrt(enough / numbers) : tolerance;
}

}  // namespace

void expect_agreement(const Function& fast, const Function& reference, const Tensors& inputs,
                      double tolerance) {
  bool bfloat16 = false;
  for (const auto& x : inputs) bfloat16 |= x.scalar_type() == at::kBFloat16;
  if (tolerance == 0) tolerance = bfloat16 ? 1.5e-2 : 2e-6;

  Tensors in64;
  for (const auto& x : inputs) in64.push_back(in_double(x).cpu());
  const auto want_in = leaves(in64), got_in = leaves(inputs);
  const auto want = reference(want_in);
  Tensors upstream;
  for (const auto& y : want)
    upstream.push_back(is_floating(y) ? random(y.sizes(), y.scalar_type()) : at::Tensor());
  for (std::size_t i = 0; bfloat16 && i < upstream.size(); ++i) {
    if (upstream[i].defined() && !upstream[i].is_complex())
      upstream[i] = upstream[i].to(at::kBFloat16).to(at::kDouble);
  }
  const auto want_grad = gradients(want, want_in, upstream);

  const PoisonedMemory poisoned;
  const auto got = fast(got_in);
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].sizes(), want[i].sizes()) << "output " << i;
    EXPECT_LE(relative_error(got[i], want[i]), bound(tolerance, want[i]))
        << "output " << i << " of shape " << got[i].sizes();
  }
  const auto got_grad = gradients(got, got_in, upstream);
  for (std::size_t i = 0; i < got_grad.size(); ++i) {
    EXPECT_LE(relative_error(got_grad[i], want_grad[i]), bound(tolerance, want_grad[i]))
        << "gradient " << i << " of shape " << got_grad[i].sizes();
  }
}

void expect_gradients(const Function& f, const Tensors& inputs) {
  const auto in = leaves(inputs);
  const auto out = f(in);
  Tensors upstream;
  for (const auto& y : out)
    upstream.push_back(is_floating(y) ? random(y.sizes(), y.scalar_type()) : at::Tensor());
  const auto loss = [&](const Tensors& x) {
    const at::NoGradGuard no_grad;
    const auto y = f(x);
    double sum = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      if (is_floating(y[i])) sum += at::real(at::conj(upstream[i]) * y[i]).sum().item<double>();
    }
    return sum;
  };
  const auto analytic = gradients(out, in, upstream);
  constexpr double step = 1e-6;
  std::size_t g = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    if (!in[i].requires_grad()) continue;
    // A complex gradient is (dL/d re, dL/d im).
    const auto as_real = [](const at::Tensor& x) {
      return (x.is_complex() ? at::view_as_real(x.resolve_conj()) : x).contiguous().view(-1);
    };
    auto moved = in;
    const auto base = in[i].detach().clone();
    const auto numeric = at::empty({as_real(base).numel()}, at::kDouble);
    for (int64_t j = 0; j < numeric.numel(); ++j) {
      double sides[2];
      for (const int side : {0, 1}) {
        auto x = base.clone();
        as_real(x)[j] += side == 0 ? -step : step;
        moved[i] = x;
        sides[side] = loss(moved);
      }
      numeric[j] = (sides[1] - sides[0]) / (2 * step);
    }
    EXPECT_LE(relative_error(as_real(analytic[g]), numeric), 1e-6) << "gradient of input " << i;
    ++g;
  }
}

struct CountedMemory::Counter : c10::MemoryReportingInfoBase {
  std::atomic<int64_t> live = 0, peak = 0;

  void reportMemoryUsage(void* /*memory*/, int64_t bytes, std::size_t /*allocated*/, std::size_t /*reserved*/,
                         c10::Device /*device*/) override {
    const int64_t now = live += bytes;  // fewer where it is given back
    for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {
    }
  }
  bool memoryProfilingEnabled() const override { return true; }
};

CountedMemory::CountedMemory()
    : counter_(std::make_shared<Counter>()), guard_(c10::DebugInfoKind::PROFILER_STATE, counter_) {}

int64_t CountedMemory::now() const {
  return counter_->live;
}

int64_t CountedMemory::peak() const {
  return counter_->peak;
}

void expect_error(const std::function<void()>& f, const std::string& text) {
  try {
    f();
    ADD_FAILURE() << "no error; expected: " << text;
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(text), std::string::npos)
        << error.what_without_backtrace();
  }
}

}  // namespace megalodon::ops::testing
