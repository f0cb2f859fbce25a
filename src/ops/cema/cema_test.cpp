#include "ops/cema/cema.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <thread>

#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

// p, q, eta, omega as a model has them, with |q| between `low` and `high`.
Tensors coefficients(int64_t D, int64_t N, at::ScalarType type, double low = 0.3, double high = 0.98) {
  const auto u = [&] { return at::sigmoid(testing::random({D, N}, at::kDouble)); };
  const auto p = u(), radius = low + (high - low) * u(), angle = 3 * testing::random({D, N}, at::kDouble);
  const auto eta =
      at::complex(testing::random({D, N}, at::kDouble), testing::random({D, N}, at::kDouble)) / 4;
  const auto complex = at::toComplexType(type);
  return {p.to(type), at::polar(radius, angle).to(complex), eta.to(complex), testing::random({D}, type)};
}

testing::Function with(CemaResult (*f)(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                       const at::Tensor&, const at::Tensor&,
                                       const std::optional<at::Tensor>&)) {
  return [f](const Tensors& x) {
    const auto result = f(x[0], x[1], x[2], x[3], x[4], x.size() > 5 ? std::optional(x[5]) : std::nullopt);
    return Tensors{result.y, result.h_last};
  };
}

struct Shape {
  int64_t B, L, D, N;
};

void expect_fast_agrees(const Shape& s, at::ScalarType type, bool carried, double low, double high,
                        double tolerance = 0) {
  SCOPED_TRACE(::testing::Message() << s.B << " " << s.L << " " << s.D << " " << s.N
                                    << (carried ? " carried" : ""));
  Tensors inputs{testing::random({s.B, s.L, s.D}, type)};
  for (const auto& c : coefficients(s.D, s.N, at::kFloat, low, high)) inputs.push_back(c);
  if (carried) inputs.push_back(testing::random({s.B, s.D, s.N}, at::kComplexFloat));
  testing::expect_agreement(with(&cema), with(&cema_reference), inputs, tolerance);
}

// The kernels go by blocks of 16 steps, eight at a time, and by vectors of 4, 8 or 16 features.
TEST(Cema, AgreesWithReference) {
  const Shape shapes[] = {{1, 1, 1, 1},     {2, 1, 16, 16},   {7, 1, 33, 20},  {2, 2, 5, 16},
                          {1, 15, 16, 16},  {1, 16, 17, 16},  {2, 17, 15, 16}, {7, 5, 40, 8},
                          {1, 97, 33, 3},   {3, 64, 48, 5},   {1, 70, 5, 20},  {1, 127, 16, 2},
                          {2, 128, 16, 16}, {2, 129, 35, 16}, {7, 145, 3, 1}};
  for (const auto& shape : shapes) {
    for (const bool carried : {false, true}) {
      expect_fast_agrees(shape, at::kFloat, carried, 0.3, 0.98);
      expect_fast_agrees(shape, at::kBFloat16, carried, 0.3, 0.98);
    }
  }
}

// CUDA's kernels for bfloat16 go by tiles of 512 steps and 16 features; where there are features for all
// multiprocessors, one after the other through the sequences.
TEST(Cema, AgreesOverManyTiles) {
  const Shape shapes[] = {{1, 512, 16, 16}, {2, 511, 16, 16}, {2, 1024, 32, 16},
                          {3, 1537, 48, 8}, {1, 2100, 16, 3}, {3, 512, 2128, 1}};
  for (const auto& shape : shapes) {
    for (const bool carried : {false, true}) expect_fast_agrees(shape, at::kBFloat16, carried, 0.3, 0.98);
  }
  expect_fast_agrees({1, 1536, 16, 16}, at::kBFloat16, true, 0.99, 0.9999);
  expect_fast_agrees({1, 1536, 16, 16}, at::kBFloat16, true, 0, 1e-4);
}

TEST(Cema, AgreesWhereTheLastStateIsNotUsed) {
  const auto output_of = [](auto f) {
    return [f](const Tensors& x) {
      return Tensors{f(x[0], x[1], x[2], x[3], x[4], x.size() > 5 ? std::optional(x[5]) : std::nullopt).y};
    };
  };
  for (const Shape& s : {Shape{3, 2560, 32, 16}, {2, 512, 16, 3}}) {
    Tensors inputs{testing::random({s.B, s.L, s.D}, at::kBFloat16)};
    for (const auto& c : coefficients(s.D, s.N, at::kFloat)) inputs.push_back(c);
    testing::expect_agreement(output_of(&cema), output_of(&cema_reference), inputs);
    inputs.push_back(testing::random({s.B, s.D, s.N}, at::kComplexFloat));
    testing::expect_agreement(output_of(&cema), output_of(&cema_reference), inputs);
  }
}

TEST(Cema, GradientsOfCoefficientsThatAreZero) {
  Tensors inputs{testing::random({2, 520, 16}, at::kBFloat16)};
  for (const auto& c : coefficients(16, 4, at::kFloat)) inputs.push_back(c);
  for (const int64_t which : {1, 3}) inputs[which].select(1, which).zero_();  // of p and of eta
  inputs[2].select(1, 0).zero_();                                             // of q
  testing::expect_agreement(with(&cema), with(&cema_reference), inputs);
}

TEST(Cema, GradientsFlowFromTheStateAlone) {
  for (const int64_t L : {1, 40}) {
    Tensors inputs{testing::random({2, L, 20})};
    for (const auto& c : coefficients(20, 16, at::kFloat)) inputs.push_back(c);
    inputs.push_back(testing::random({2, 20, 16}, at::kComplexFloat));
    const auto state_of = [](auto f) {
      return [f](const Tensors& x) {
        const auto h = f(x[0], x[1], x[2], x[3], x[4], x[5]).h_last;
        return Tensors{h, 2 * x[3].abs(), 2 * x[4]};  // eta and omega have no part in the state
      };
    };
    testing::expect_agreement(state_of(&cema), state_of(&cema_reference), inputs);
  }
}

TEST(Cema, AgreesWhereTheStateHardlyOrAlmostAlwaysDecays) {
  expect_fast_agrees({2, 300, 20, 16}, at::kFloat, true, 0.999, 0.99999, 1e-5);
  expect_fast_agrees({2, 300, 20, 16}, at::kFloat, true, 0, 1e-4);
  expect_fast_agrees({2, 50, 20, 16}, at::kFloat, true, 0, 1e-30);
}

TEST(Cema, GradientsMeetFiniteDifferences) {
  Tensors inputs{testing::random({2, 5, 3}, at::kDouble)};
  for (const auto& c : coefficients(3, 2, at::kDouble)) inputs.push_back(c);
  testing::expect_gradients(with(&cema), inputs);
  inputs.push_back(testing::random({2, 3, 2}, at::kComplexDouble));
  testing::expect_gradients(with(&cema), inputs);
}

TEST(Cema, AnySplitIsTheWhole) {
  const auto c = coefficients(24, 16, at::kFloat);
  const auto x = testing::random({2, 200, 24});
  const auto whole = cema(x, c[0], c[1], c[2], c[3]);
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{1, 199}, {16, 1, 31, 116, 36}, {150, 50}}) {
    std::optional<at::Tensor> h;
    at::Tensor last;
    Tensors pieces;
    int64_t begin = 0;
    for (const auto length : lengths) {
      const auto part = cema(x.narrow(1, begin, length), c[0], c[1], c[2], c[3], h);
      pieces.push_back(part.y);
      h = last = part.h_last;
      begin += length;
    }
    EXPECT_LE(testing::relative_error(at::cat(pieces, 1), whole.y), 1e-6);
    EXPECT_LE(testing::relative_error(last, whole.h_last), 1e-6);
  }
}

TEST(Cema, TwoRunsGiveTheSameBits) {
  const auto run = [](int64_t L, int64_t D, at::ScalarType type) {
    at::manual_seed(3);
    Tensors in{at::randn({3, L, D}).to(type), at::rand({D, 16}),
               at::polar(at::rand({D, 16}), at::rand({D, 16})),
               at::complex(at::randn({D, 16}), at::randn({D, 16})), at::randn({D})};
    for (auto& t : in) t = t.to(testing::device()).set_requires_grad(true);
    cema(in[0], in[1], in[2], in[3], in[4]).y.square().sum().backward();
    Tensors gradients;
    for (auto& t : in) gradients.push_back(t.grad());
    return gradients;
  };
  const auto expect_same = [&](int64_t L, int64_t D, at::ScalarType type) {
    const auto a = run(L, D, type), b = run(L, D, type);
    for (std::size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i], b[i])) << i;
  };
  expect_same(90, 40, at::kFloat);
  expect_same(1600, 32, at::kBFloat16);
}

// On a GPU the kernel starts before the one that writes coefficients has ended.
TEST(Cema, TakesCoefficientsThatWereJustWritten) {
  const auto x = testing::random({2, 1024, 256}, at::kBFloat16).set_requires_grad(true);
  const Tensors sets[] = {coefficients(256, 16, at::kFloat), coefficients(256, 16, at::kFloat)};
  const auto run = [&](const Tensors& c) { return cema(x, c[0], c[1], c[2], c[3]).y; };
  const auto gradient = [&](const at::Tensor& y) { return torch::autograd::grad({y.sum()}, {x})[0]; };
  Tensors written;
  for (const auto& c : sets[0]) written.push_back(at::zeros_like(c));
  for (std::size_t turn = 0; turn < 16; ++turn) {
    const auto& set = sets[turn % 2];
    for (std::size_t i = 0; i < 4; ++i) {
      const auto which = (turn / 2 + i) % 4;  // each is the last one in turn
      written[which].copy_(set[which]);
    }
    const auto y = run(written), want = run(set);
    EXPECT_TRUE(at::equal(y, want)) << turn;
    EXPECT_TRUE(at::equal(gradient(y), gradient(want))) << turn;
  }
}

// On a GPU the first that a thread does.
TEST(Cema, WorksInANewThread) {
  const auto x = testing::random({2, 512, 16}, at::kBFloat16);
  const auto c = coefficients(16, 4, at::kFloat);
  const auto want = cema(x, c[0], c[1], c[2], c[3]).y;
  at::Tensor got;
  std::thread([&] { got = cema(x, c[0], c[1], c[2], c[3]).y; }).join();
  EXPECT_TRUE(at::equal(got, want));
}

TEST(Cema, NamesWhatDoesNotFit) {
  const auto c = coefficients(6, 4, at::kFloat);
  const Tensors fitting{
      at::zeros({2, 3, 6}), c[0], c[1], c[2], c[3], at::zeros({2, 6, 4}, at::kComplexFloat)};
  const auto expect = [&](std::size_t argument, const at::Tensor& value, const std::string& message) {
    auto arguments = fitting;
    arguments[argument] = value;
    testing::expect_error([&] { with (&cema)(arguments); }, "[cema] " + message);
  };
  expect(0, at::zeros({2, 3, 6}, at::kHalf), "x: float16 is not supported");
  expect(0, at::zeros({3, 6}), "x: expected 3 dimensions, got shape [3, 6]");
  expect(0, at::zeros({2, 0, 6}), "x: expected at least one sequence, step and feature, got shape [2, 0, 6]");
  expect(0, at::zeros({2, 3, 5}), "p: expected shape [5, any], got [6, 4]");
  expect(1, at::zeros({6, 4}, at::kDouble), "p: expected Float, got Double");
  expect(1, at::zeros({6, 0}), "p: expected at least one component");
  expect(2, at::zeros({6, 4}), "q: expected ComplexFloat, got Float");
  expect(2, at::zeros({6, 5}, at::kComplexFloat), "q: expected shape [6, 4], got [6, 5]");
  expect(3, at::zeros({4, 6}, at::kComplexFloat), "eta: expected shape [6, 4], got [4, 6]");
  expect(4, at::zeros({6, 1}), "omega: expected shape [6], got [6, 1]");
  expect(5, at::zeros({3, 6, 4}, at::kComplexFloat), "h0: expected shape [2, 6, 4], got [3, 6, 4]");
}

}  // namespace
}  // namespace megalodon::ops
