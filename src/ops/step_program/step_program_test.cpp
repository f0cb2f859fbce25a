#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "ops/attention_step/attention_step.h"
#include "ops/device_graph.h"
#include "ops/norm_cema_step/norm_cema_step.h"
#include "ops/skinny_linear/skinny_linear.h"
#include "ops/testing.h"

namespace megalodon::ops {
namespace {
using testing::Tensors;

struct Shape {
  int64_t B, D, G, N, H, dz, dv, hidden, chunk, C, start;
};

// A layer of Megalodon and the norm behind it.
struct Layer {
  Shape s;
  at::Tensor x, start, count, mean, var, h, k, v;
  at::Tensor weight, bias, p, q, eta, omega, rms, norm_weight, norm_bias, gamma, beta;
  at::Tensor wv, bv, wz, bz, wr, br, wh, bh, wo, gate, up, down;

  template <class F>  // f(tensor) for all, to change them
  void for_tensors(F&& f) {
    for (auto* t : {&x,  &start, &count, &mean, &var,         &h,         &k,     &v,    &weight, &bias, &p,
                    &q,  &eta,   &omega, &rms,  &norm_weight, &norm_bias, &gamma, &beta, &wv,     &bv,   &wz,
                    &bz, &wr,    &br,    &wh,   &bh,          &wo,        &gate,  &up,   &down})
      f(*t);
  }

  explicit Layer(const Shape& shape) : s(shape) {
    const int64_t E = s.H * s.dv, Z = s.H * s.dz;
    const auto matrix = [](int64_t out, int64_t in) {
      return testing::random({out, in}, at::kBFloat16) / std::sqrt(static_cast<double>(in));
    };
    const auto small = [](at::IntArrayRef size) { return testing::random(size) * 0.1; };
    const auto angle = testing::random({s.D, s.N}) * 3, radius = at::sigmoid(testing::random({s.D, s.N}));
    x = testing::random({s.B, 1, s.D}, at::kBFloat16);
    start = testing::beside(x, at::arange(s.B, at::kLong) * 5 + s.start);
    count = start + 2;
    mean = small({s.B, s.G}), var = testing::random({s.B, s.G}).square() + 0.5;
    h = testing::random({s.B, s.D, s.N, 2});
    k = testing::random({s.B, s.C, s.H, s.dz}, at::kBFloat16);
    v = testing::random({s.B, s.C, s.H, s.dv}, at::kBFloat16);
    weight = small({s.D}), bias = small({s.D}), p = at::sigmoid(testing::random({s.D, s.N}));
    q = at::stack({radius * angle.cos(), radius * angle.sin()}, -1);
    eta = testing::random({s.D, s.N, 2}) / 4, omega = testing::random({s.D});
    rms = small({s.D}), norm_weight = small({s.D}), norm_bias = small({s.D});
    gamma = small({2, Z}), beta = small({2, Z});
    wv = matrix(E, s.D), bv = small({E}), wz = matrix(Z, s.D), bz = small({Z}), wr = matrix(E, s.D),
    br = small({E});
    wh = matrix(s.D, s.D), bh = small({s.D}), wo = matrix(s.D, E);
    gate = matrix(s.hidden, s.D), up = matrix(s.hidden, s.D), down = matrix(s.D, s.hidden);
  }

  // What is made on the way, with the operators or their definitions.
  Tensors step(decltype(norm_cema_step)* norm_cema, decltype(attention_step)* attend,
               std::vector<at::Tensor> (*linear)(const std::vector<SkinnyLayer>&, double)) const {
    const auto complex = [](const at::Tensor& t) { return at::view_as_complex(t); };
    const auto heads = [&](const at::Tensor& t) { return t.unflatten(-1, {s.H, -1}); };
    const auto first =
        norm_cema(x, {weight, bias, 1e-5, p, complex(q), complex(eta), omega}, {count, mean, var}, h);
    const SkinnyLayer smoothed{.x = first.y, .norm = InputNorm::rms, .norm_weight = rms};
    auto of_z = smoothed, of_r = smoothed, of_h = smoothed;
    of_z.weight = wz, of_z.bias = bz;
    of_r.weight = wr, of_r.bias = br, of_r.silu = true;
    of_h.weight = wh, of_h.bias = bh, of_h.add = x;
    const auto y =
        linear({{.x = first.normal, .weight = wv, .bias = bv, .silu = true}, of_z, of_r, of_h}, 1e-5);
    const auto o = attend(heads(y[1]), {gamma, beta, s.chunk, 1e4, 1e-5}, heads(y[0]), y[2], start, {k, v});
    const auto attended = linear({{.x = o, .weight = wo, .add = y[3]}}, 1e-5)[0];
    const auto hidden = linear({{.x = attended,
                                 .norm = InputNorm::layer,
                                 .norm_weight = norm_weight,
                                 .norm_bias = norm_bias,
                                 .weight = gate,
                                 .silu = true,
                                 .up = up}},
                               1e-5)[0];
    const auto out = linear({{.x = hidden, .weight = down, .add = attended}}, 1e-5)[0];
    return {first.normal, first.y, first.count, y[0], y[1], y[2], y[3], o, attended, hidden, out};
  }
};

// Recorded, the operators of a step become one kernel; it keeps to their definitions, again and again.
TEST(StepProgram, AgreesWithTheDefinitions) {
  if (!testing::device().is_cuda()) GTEST_SKIP() << "programs run on a GPU";
  const at::NoGradGuard no_grad;
  for (const auto& shape : {Shape{1, 2048, 64, 16, 2, 256, 2048, 512, 2048, 4096, 10},
                            {1, 256, 8, 16, 1, 64, 256, 192, 600, 1200, 575},
                            {2, 192, 8, 8, 3, 64, 128, 320, 16, 32, 1000 * 16 + 14},
                            {3, 64, 4, 4, 2, 8, 32, 64, 7, 9, 0},
                            {4, 320, 10, 12, 2, 24, 32, 64, 300, 300, 3000},
                            {4, 512, 16, 16, 4, 128, 64, 1088, 40, 80, 39},
                            {3, 64, 4, 16, 4, 256, 512, 64, 1000, 1000, 980}}) {
    SCOPED_TRACE(::testing::Message() << shape.B << " x " << shape.D << " from " << shape.start);
    Layer layer(shape), reference = layer;
    layer.for_tensors([](at::Tensor& t) { t = t.clone(); });
    reference.for_tensors([](at::Tensor& t) {
      t = t.cpu();
      if (t.is_floating_point()) t = t.to(at::kDouble);
    });
    {
      Layer warm = layer;
      warm.for_tensors([](at::Tensor& t) { t = t.clone(); });
      warm.step(norm_cema_step, attention_step, skinny_linear);
    }
    Tensors got;
    const auto graph = DeviceGraph::record(
        testing::device(), [&] { got = layer.step(norm_cema_step, attention_step, skinny_linear); });
    EXPECT_EQ(graph->launches(), 1u);
    for (int t = 0; t < 3; ++t) {
      const auto want =
          reference.step(norm_cema_step_reference, attention_step_reference, skinny_linear_reference);
      for (auto& made : got)
        if (made.is_floating_point()) made.fill_(std::nan(""));
      graph->replay();
      for (std::size_t i = 0; i < want.size(); ++i) {
        ASSERT_EQ(got[i].sizes(), want[i].sizes());
        EXPECT_LE(testing::relative_error(got[i], want[i]), 3e-2) << "output " << i << " of step " << t;
      }
      const auto same = [&](const at::Tensor& a, const at::Tensor& b, const char* name) {
        EXPECT_LE(testing::relative_error(a, b), 2e-2) << name << " after step " << t;
      };
      same(layer.mean, reference.mean, "mean"), same(layer.var, reference.var, "variance");
      same(layer.h, reference.h, "moving average");
      same(layer.k, reference.k, "keys"), same(layer.v, reference.v, "values");
      for (auto* of : {&layer, &reference}) of->start += 1;
      layer.count.copy_(got[2]), reference.count = want[2];
    }
  }
}

}  // namespace
}  // namespace megalodon::ops
