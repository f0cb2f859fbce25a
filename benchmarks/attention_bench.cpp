#include "ops/attention/attention.h"

#include <cmath>

#include "ops/query_key/query_key.h"
#include "ops_bench.h"

namespace megalodon::bench {
namespace {
using Tensors = std::vector<at::Tensor>;

struct Shape {
  int64_t B, L, H, dk, dv, chunk;  // chunk 0: plain causal
};

Tensors inputs(const Shape& s, at::ScalarType type) {
  return {at::randn({s.B, s.L, s.H, s.dk}).to(type), at::randn({s.B, s.L, s.H, s.dk}).to(type),
          at::randn({s.B, s.L, s.H, s.dv}).to(type)};
}

std::function<at::Tensor(const Tensors&)> ours(const Shape& s) {
  const ops::AttentionOptions options{.chunk = s.chunk, .scale = 1 / std::sqrt(static_cast<double>(s.dk))};
  return [=](const Tensors& in) {
    return ops::attention(in[0], in[1], in[2], at::zeros({s.B}, at::kLong), options);
  };
}

// torch's, each chunk a row of the batch.
std::function<at::Tensor(const Tensors&)> peer(const Shape& s) {
  const int64_t c = s.chunk > 0 ? s.chunk : s.L;
  return [=](const Tensors& in) {
    const auto fold = [&](const at::Tensor& x) {
      return x.view({s.B * s.L / c, c, s.H, x.size(3)}).transpose(1, 2);
    };
    return at::scaled_dot_product_attention(fold(in[0]), fold(in[1]), fold(in[2]), {}, 0, /*is_causal=*/true);
  };
}

Comparison training(const std::string& name, const Shape& s, at::ScalarType type) {
  return {name,
          {{"megalodon", [=] { return forward_backward(ours(s), inputs(s, type)); }},
           {"sdpa", [=] { return forward_backward(peer(s), inputs(s, type)); }}}};
}

Comparison decoding(const std::string& name, int64_t B, int64_t H, int64_t dk, int64_t dv, int64_t chunk,
                    at::ScalarType type) {
  const auto step = [=]() -> std::function<void()> {
    const auto in = inputs({B, 1, H, dk, dv, chunk}, type);
    const auto held = inputs({B, chunk, H, dk, dv, chunk}, type);
    const ops::AttentionCache cache{held[1], held[2]};
    const auto start = at::full({B}, 1000 * chunk + chunk - 1, at::kLong);  // a chunk's last position
    return [=] { ops::attention(in[0], in[1], in[2], start, {.chunk = chunk}, cache); };
  };
  const auto read = [=]() -> std::function<void()> {
    const auto held = inputs({B, chunk, H, dk, dv, chunk}, type);
    return [=] {
      held[1].sum();
      held[2].sum();
    };
  };
  return {name, {{"megalodon", step}, {"sum of the cache", read}}};
}

Comparison queries_and_keys(at::ScalarType type) {
  constexpr int64_t B = 4, L = 2048, H = 3, dz = 64;
  const auto with = [=](decltype(ops::query_key)* f) {
    return [=] {
      const auto both = [=](const Tensors& in) {
        const auto [q, k] = f(in[0], in[1], in[2], at::zeros({B}, at::kLong), 512, 1e4, 1e-5);
        return at::stack({q, k});
      };
      return forward_backward(
          both, {at::randn({B, L, H, dz}).to(type), at::randn({2, H * dz}), at::randn({2, H * dz})});
    };
  };
  return {std::string("query_key forward+backward [4,2048,3,64] ") + at::toString(type),
          {{"megalodon", with(ops::query_key)}, {"torch", with(ops::query_key_reference)}}};
}

}  // namespace

std::vector<Comparison> attention_comparisons() {
  const Shape chunked{4, 2048, 3, 64, 128, 512}, plain{4, 2048, 6, 64, 64, 0};
  std::vector<Comparison> all;
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const std::string name = at::toString(type);
    all.push_back(training("attention forward+backward 4 chunks of 512, H 3, 64/128 " + name, chunked, type));
    all.push_back(training("attention forward+backward causal 2048, H 6, 64 " + name, plain, type));
    all.push_back(
        decoding("attention step B 1, H 1, 256/2048, chunk 2048 " + name, 1, 1, 256, 2048, 2048, type));
    all.push_back(decoding("attention step B 16, H 6, 64/64, chunk 2048 " + name, 16, 6, 64, 64, 2048, type));
    all.push_back(queries_and_keys(type));
  }
  return all;
}

}  // namespace megalodon::bench
