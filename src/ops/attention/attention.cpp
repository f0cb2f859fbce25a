#include "ops/attention/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;

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
  const auto on_cpu = start.cpu().contiguous();
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
  check_start(start, L, options, cache);
}

std::optional<AttentionCache> join(const Optional& k, const Optional& v) {
  TORCH_CHECK(k.has_value() == v.has_value(), "[attention] cache: expected keys and values together");
  return k ? std::optional(AttentionCache{*k, *v}) : std::nullopt;
}

at::Tensor forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                   const Optional& cache_k, const Optional& cache_v, int64_t chunk, int64_t previous_chunks,
                   double scale, double dropout, int64_t dropout_key) {
  const AttentionOptions options{chunk, previous_chunks, scale, dropout, dropout_key};
  const auto cache = join(cache_k, cache_v);
  check(q, k, v, start, options, cache);
  return attention_reference(q, k, v, start, options, cache);
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                     const AttentionOptions& options, const std::optional<AttentionCache>& cache) {
  static const auto op = registered<decltype(forward)>("megalodon::attention");
  return op.call(q, k, v, start, cache ? Optional(cache->k) : std::nullopt,
                 cache ? Optional(cache->v) : std::nullopt, options.chunk, options.previous_chunks,
                 options.scale, options.dropout, options.dropout_key);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor start, Tensor? cache_k=None, Tensor? cache_v=None, "
      "int chunk=0, int previous_chunks=0, float scale=1.0, float dropout=0.0, int dropout_key=0) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("attention", &forward);
}

}  // namespace megalodon::ops
