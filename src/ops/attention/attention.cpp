#include "ops/attention/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "ops/attention/kernel.h"
#include "ops/cache_store/cache_store.h"
#include "ops/check.h"
#include "ops/dropout/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check_options(const AttentionOptions& options) {
  TORCH_CHECK(options.chunk >= 0, "[attention] chunk: expected at least 0, got ", options.chunk);
  TORCH_CHECK(options.previous_chunks >= 0, "[attention] previous_chunks: expected at least 0, got ",
              options.previous_chunks);
  TORCH_CHECK(options.dropout >= 0 && options.dropout < 1,
              "[attention] dropout: expected 0 <= dropout < 1, got ", options.dropout);
}

// The first position that the query at `position` sees.
int64_t first_visible(int64_t position, const AttentionOptions& options) {
  if (options.chunk == 0) return 0;
  return std::max<int64_t>(0, position / options.chunk - options.previous_chunks) * options.chunk;
}

// What is visible before each start must be in the cache.
void check_start(const at::Tensor& start, int64_t L, const AttentionOptions& options,
                 const std::optional<AttentionCache>& cache) {
  const auto on_cpu = start.contiguous();
  for (int64_t b = 0; b < on_cpu.numel(); ++b) {
    const int64_t s = on_cpu.const_data_ptr<int64_t>()[b];
    TORCH_CHECK(s >= 0 && s <= std::numeric_limits<int64_t>::max() - L, "[attention] start: row ", b,
                ": expected a position >= 0, got ", s);
    const int64_t needed = s - first_visible(s, options);
    TORCH_CHECK(cache || needed == 0, "[attention] start: row ", b, ": position ", s, " sees ", needed,
                " earlier keys: expected them in a cache, got none");
    TORCH_CHECK(!cache || needed <= cache->k.size(1), "[attention] cache: row ", b, ": position ", s,
                " sees ", needed, " earlier keys: expected at least as many slots, got ", cache->k.size(1));
  }
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
           const AttentionOptions& options, const std::optional<AttentionCache>& cache) {
  check_activation("attention", "q", q, 4);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), dk = q.size(3);
  check_type("attention", "k", k, q.scalar_type());
  check_type("attention", "v", v, q.scalar_type());
  check_shape("attention", "k", k, {B, L, -1, dk});
  const int64_t Hkv = k.size(2);
  TORCH_CHECK(Hkv > 0 && H % Hkv == 0,
              "[attention] k: expected a number of heads that divides those of q, got ", Hkv, " and ", H);
  check_shape("attention", "v", v, {B, L, Hkv, -1});
  check_type("attention", "start", start, at::kLong);
  check_shape("attention", "start", start, {B});
  check_options(options);
  if (cache) {
    check_type("attention", "cache.k", cache->k, q.scalar_type());
    check_type("attention", "cache.v", cache->v, q.scalar_type());
    check_shape("attention", "cache.k", cache->k, {B, -1, Hkv, dk});
    check_shape("attention", "cache.v", cache->v, {B, cache->k.size(1), Hkv, v.size(3)});
  }
  if (start.is_cpu()) check_start(start, L, options, cache);  // a look at other devices would wait for them
}

std::optional<AttentionCache> join(const Optional& k, const Optional& v) {
  TORCH_CHECK(k.has_value() == v.has_value(), "[attention] cache: expected keys and values together");
  return k ? std::optional(AttentionCache{*k, *v}) : std::nullopt;
}

cpu::AttentionSizes sizes_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& o, int64_t C) {
  return {.B = q.size(0),
          .L = q.size(1),
          .H = q.size(2),
          .Hkv = k.size(2),
          .dk = q.size(3),
          .dv = v.size(3),
          .C = C,
          .chunk = o.chunk,
          .previous_chunks = o.chunk > 0 ? o.previous_chunks : 0,
          .scale = static_cast<float>(o.scale),
          .dropout_threshold = dropout_threshold(o.dropout),
          .kept = static_cast<float>(1 / (1 - o.dropout)),
          .dropout_key = static_cast<uint64_t>(o.dropout_key)};
}

// The CUDA kernels leave dropout to the reference, and earlier chunks without a cache.
bool has_kernel(const at::Tensor& q, const AttentionOptions& options, bool cached) {
  const bool plain = options.dropout == 0 && (cached || options.previous_chunks == 0 || options.chunk == 0);
  return has_fast_kernel(q) && (q.is_cpu() || plain);
}

// o, and the logarithms of the softmax's denominators [B, H, L].
Pair forward_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                 const Optional& cache_k, const Optional& cache_v, int64_t chunk, int64_t previous_chunks,
                 double scale, double dropout, int64_t dropout_key) {
  const auto q_ = q.contiguous(), k_ = k.contiguous(), v_ = v.contiguous(), start_ = start.contiguous();
  const auto cached = [](const Optional& x) { return x ? x->contiguous() : at::Tensor(); };
  const auto cache_k_ = cached(cache_k), cache_v_ = cached(cache_v);
  const auto sizes = sizes_of(q, k, v, {chunk, previous_chunks, scale, dropout, dropout_key},
                              cache_k ? cache_k->size(1) : 0);
  const auto o = at::empty({sizes.B, sizes.L, sizes.H, sizes.dv}, q.options());
  const auto lse = at::empty({sizes.B, sizes.H, sizes.L}, q.options().dtype(at::kFloat));
  with_element_type(q, [&]<class T>(T*) {
    const cpu::AttentionInputs<T> in{pointer<T>(q_),           pointer<T>(k_),       pointer<T>(v_),
                                     pointer<int64_t>(start_), pointer<T>(cache_k_), pointer<T>(cache_v_)};
    cpu::attention_forward(sizes, in, mutable_pointer<T>(o), mutable_pointer<float>(lse));
  });
  return {o, lse};
}

Triple backward_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                    const at::Tensor& o, const at::Tensor& lse, const at::Tensor& d_o, int64_t chunk,
                    int64_t previous_chunks, double scale, double dropout, int64_t dropout_key) {
  const auto q_ = q.contiguous(), k_ = k.contiguous(), v_ = v.contiguous(), start_ = start.contiguous();
  const auto d_o_ = d_o.contiguous(), dq = at::empty_like(q_);
  const auto sizes = sizes_of(q, k, v, {chunk, previous_chunks, scale, dropout, dropout_key}, 0);
  // Where a key is seen from several chunks its gradient is a sum, in float32.
  const bool sums = sizes.previous_chunks > 0;
  const auto gradient = [&](const at::Tensor& x) {
    return sums ? at::zeros(x.sizes(), x.options().dtype(at::kFloat)) : at::empty_like(x);
  };
  const auto dk = gradient(k_), dv = gradient(v_);
  with_element_type(q, [&]<class T>(T*) {
    const cpu::AttentionInputs<T> in{pointer<T>(q_),           pointer<T>(k_), pointer<T>(v_),
                                     pointer<int64_t>(start_), nullptr,        nullptr};
    const auto run = [&]<class G>(G*) {
      cpu::attention_backward(sizes, in, pointer<T>(o), pointer<float>(lse), pointer<T>(d_o_),
                              mutable_pointer<T>(dq), mutable_pointer<G>(dk), mutable_pointer<G>(dv));
    };
    sums ? run(static_cast<float*>(nullptr)) : run(static_cast<T*>(nullptr));
  });
  return {dq, dk.to(k.scalar_type()), dv.to(v.scalar_type())};
}

at::Tensor infer_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                     const Optional& cache_k, const Optional& cache_v, int64_t chunk, int64_t previous_chunks,
                     double scale, double dropout, int64_t dropout_key) {
  const AttentionOptions options{chunk, previous_chunks, scale, dropout, dropout_key};
  const auto cache = join(cache_k, cache_v);
  check(q, k, v, start, options, cache);
  if (!has_fast_kernel(q)) return attention_reference(q, k, v, start, options, cache);
  return std::get<0>(
      forward_cpu(q, k, v, start, cache_k, cache_v, chunk, previous_chunks, scale, dropout, dropout_key));
}

struct Attention : torch::autograd::Function<Attention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& start, int64_t chunk,
                            int64_t previous_chunks, double scale, double dropout, int64_t dropout_key) {
    static const auto op = registered<decltype(forward_cpu)>("megalodon::attention_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [o, lse] =
        op.call(q, k, v, start, {}, {}, chunk, previous_chunks, scale, dropout, dropout_key);
    ctx->save_for_backward({q, k, v, start, o, lse});
    ctx->saved_data["chunk"] = chunk;
    ctx->saved_data["previous_chunks"] = previous_chunks;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["dropout_key"] = dropout_key;
    return o;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::attention_backward");
    const auto x = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto [dq, dk, dv] = op.call(x[0], x[1], x[2], x[3], x[4], x[5], dy[0], data["chunk"].toInt(),
                                      data["previous_chunks"].toInt(), data["scale"].toDouble(),
                                      data["dropout"].toDouble(), data["dropout_key"].toInt());
    return {dq, dk, dv, {}, {}, {}, {}, {}, {}};
  }
};

at::Tensor dispatch(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                    const Optional& cache_k, const Optional& cache_v, int64_t chunk, int64_t previous_chunks,
                    double scale, double dropout, int64_t dropout_key) {
  static const auto op = registered<decltype(infer_cpu)>("megalodon::attention");
  return op.call(q, k, v, start, cache_k, cache_v, chunk, previous_chunks, scale, dropout, dropout_key);
}

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                    const Optional& cache_k, const Optional& cache_v, int64_t chunk, int64_t previous_chunks,
                    double scale, double dropout, int64_t dropout_key) {
  const AttentionOptions options{chunk, previous_chunks, scale, dropout, dropout_key};
  const auto cache = join(cache_k, cache_v);
  check(q, k, v, start, options, cache);
  if (!has_kernel(q, options, cache.has_value())) return attention_reference(q, k, v, start, options, cache);
  if (needs_gradient({q, k, v})) {
    TORCH_CHECK(!cache, "[attention] cache: expected none where gradients are wanted, got one");
    return Attention::apply(q, k, v, start, chunk, previous_chunks, scale, dropout, dropout_key);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return dispatch(q, k, v, start, cache_k, cache_v, chunk, previous_chunks, scale, dropout, dropout_key);
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                     const AttentionOptions& options, const std::optional<AttentionCache>& cache) {
  return dispatch(q, k, v, start, cache ? Optional(cache->k) : std::nullopt,
                  cache ? Optional(cache->v) : std::nullopt, options.chunk, options.previous_chunks,
                  options.scale, options.dropout, options.dropout_key);
}

at::Tensor attention_and_store(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& start, const AttentionOptions& options,
                               const AttentionCache& cache) {
  if (q.is_cuda() && q.dim() == 4 && q.size(1) == 1 && has_kernel(q, options, true)) {
    check(q, k, v, start, options, cache);
    using Call = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const at::Tensor&, const at::Tensor&, int64_t, int64_t, double);
    static const auto op = registered<Call>("megalodon::attention_and_store");
    return op.call(q, k, v, start, cache.k, cache.v, options.chunk, options.previous_chunks, options.scale);
  }
  const auto o = attention(q, k, v, start, options, cache);
  cache_store({cache.k, cache.v}, {k, v}, start);
  return o;
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor start, Tensor? cache_k=None, Tensor? cache_v=None, "
      "int chunk=0, int previous_chunks=0, float scale=1.0, float dropout=0.0, int dropout_key=0) -> Tensor");
  m.def(
      "attention_and_store(Tensor q, Tensor k, Tensor v, Tensor start, Tensor(a!) cache_k, Tensor(b!) "
      "cache_v, int chunk, int previous_chunks, float scale) -> Tensor");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor start, Tensor? cache_k, Tensor? cache_v, "
      "int chunk, int previous_chunks, float scale, float dropout, int dropout_key) -> (Tensor o, Tensor "
      "lse)");
  m.def(
      "attention_backward(Tensor q, Tensor k, Tensor v, Tensor start, Tensor o, Tensor lse, Tensor d_o, "
      "int chunk, int previous_chunks, float scale, float dropout, int dropout_key) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("attention", &infer_cpu);
  m.impl("attention_forward", &forward_cpu);
  m.impl("attention_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("attention", &autograd);
}

}  // namespace megalodon::ops
