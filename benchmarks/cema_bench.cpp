#include "ops/cema/cema.h"

#include "ops_bench.h"
#include "peers/cema_fft.h"

namespace megalodon::bench {
namespace {

std::vector<at::Tensor> inputs(int64_t B, int64_t L, int64_t D, at::ScalarType type) {
  constexpr int64_t N = 16;
  const auto q = at::polar(at::sigmoid(at::randn({D, N}) + 2), at::rand({D, N}) * 3);
  const auto eta = at::complex(at::randn({D, N}), at::zeros({D, N})) / 4;
  return {at::randn({B, L, D}).to(type), at::sigmoid(at::randn({D, N})), q, eta, at::randn({D})};
}

at::Tensor ours(const std::vector<at::Tensor>& in) {
  return ops::cema(in[0], in[1], in[2], in[3], in[4]).y;
}
at::Tensor by_fft(const std::vector<at::Tensor>& in) {
  return cema_fft(in[0], in[1], in[2], in[3], in[4]);
}

Contestant forward(const std::string& name, at::Tensor (*f)(const std::vector<at::Tensor>&), int64_t B,
                   int64_t L, int64_t D) {
  return {name, [=]() -> std::function<void()> { return [in = inputs(B, L, D, at::kFloat), f] { f(in); }; }};
}
Contestant training(const std::string& name, at::Tensor (*f)(const std::vector<at::Tensor>&), int64_t B,
                    int64_t L, int64_t D, at::ScalarType type = at::kFloat) {
  return {name, [=] { return forward_backward(f, inputs(B, L, D, type)); }};
}

}  // namespace

std::vector<Comparison> cema_comparisons() {
  return {
      {"cema forward+backward [4,4096,512] float32",
       {training("megalodon", ours, 4, 4096, 512), training("fft", by_fft, 4, 4096, 512)}},
      {"cema forward+backward [4,2048,384] float32",
       {training("megalodon", ours, 4, 2048, 384), training("fft", by_fft, 4, 2048, 384)}},
      {"cema forward [4,4096,512] float32",
       {forward("megalodon", ours, 4, 4096, 512), forward("fft", by_fft, 4, 4096, 512)}},
      {"cema forward+backward [4,4096,512] bfloat16",
       {training("megalodon", ours, 4, 4096, 512, at::kBFloat16)}},
      {"cema step [1,1,2048] float32", {forward("megalodon", ours, 1, 1, 2048)}},
  };
}

}  // namespace megalodon::bench
