#include "ops/attention/cuda_heads.h"

#include <ATen/ATen.h>
#include <torch/library.h>

// Attention of Megalodon's few and wide heads is matrix products above all. On Hopper GPUs kernels of our own
// make them (cuda_wide.cu); elsewhere, and in ragged chunks, cuBLAS does, over blocks of queries and the keys
// up to the block's end, with small kernels between. Narrow heads in short chunks have kernels of their own
// too (cuda_small.cu); other narrow heads go through torch's flash attention.
namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kBlock = 512;                     // queries whose scores are in memory at once
constexpr int64_t kMostWeights = int64_t{1} << 28;  // elements of a matrix of weights over some chunks

// Chunks of equal length that lie at equal distances: positions first + i step .. + length - 1 of the B L
// positions.
struct Chunks {
  int64_t count, length, first, step;

  // [count, length, heads, d] of x [B, L, heads, d] in rows.
  at::Tensor of(const at::Tensor& x) const {
    const int64_t row = row_of_heads(x);
    return x.as_strided({count, length, x.size(2), x.size(3)}, {step * row, row, x.size(3), 1},
                        x.storage_offset() + first * row);
  }
};

// All chunks of B sequences, in runs of equal length and distance.
std::vector<Chunks> chunks_of(int64_t B, int64_t L, int64_t chunk) {
  const int64_t c = chunk > 0 ? std::min(chunk, L) : L, whole = L / c, rest = L % c;
  if (rest == 0) return {{B * whole, c, 0, c}};
  std::vector<Chunks> all;
  for (int64_t b = 0; b < B; ++b) all.push_back({whole, c, b * L, c});
  all.push_back({B, rest, whole * c, L});
  return all;
}

// A run in shorter ones, whose weights of a head fit in memory at once.
std::vector<Chunks> within_memory(const Chunks& run) {
  std::vector<Chunks> all;
  const int64_t most = std::max<int64_t>(1, kMostWeights / (run.length * run.length));
  for (int64_t i = 0; i < run.count; i += most)
    all.push_back({std::min(most, run.count - i), run.length, run.first + i * run.step, run.step});
  return all;
}

at::Tensor product_in_float(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kFloat ? at::bmm(a, b) : at::bmm(a, b, at::kFloat);
}

bool is_flash(const at::Tensor& q, const at::Tensor& v) {
  return q.scalar_type() == at::kBFloat16 && q.size(3) == v.size(3) && q.size(3) <= 256 && q.size(3) % 8 == 0;
}

bool is_small(const at::Tensor& q, const at::Tensor& v, int64_t chunk) {
  const c10::cuda::CUDAGuard guard(q.device());
  const int64_t L = q.size(1);
  return q.scalar_type() == at::kBFloat16 && q.size(3) == v.size(3) &&
         cuda::has_small_kernels(q.size(3), chunk > 0 ? std::min(chunk, L) : L);
}

cuda::SmallSizes small_sizes(const Chunks& chunks, const at::Tensor& q, const at::Tensor& k, double scale) {
  return {.count = chunks.count,
          .length = chunks.length,
          .first = chunks.first,
          .step = chunks.step,
          .H = q.size(2),
          .Hkv = k.size(2),
          .width = q.size(3),
          .scale = static_cast<float>(scale)};
}

// One head of some chunks.
struct Head {
  at::Tensor q, k, v;  // [count, length, d]
  cuda::Scores scores;

  // The block of queries from `first` on: scores in float32, [count, queries, keys].
  at::Tensor block(int64_t first) {
    scores.first = first;
    scores.queries = std::min(kBlock, q.size(1) - first);
    scores.keys = first + scores.queries;
    return product_in_float(q.narrow(1, first, scores.queries), k.narrow(1, 0, scores.keys).transpose(1, 2));
  }
};

Head head_of(const Chunks& chunks, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t h,
             double scale) {
  const int64_t H = q.size(2), of_key = h / (H / k.size(2));
  return {chunks.of(q).select(2, h),
          chunks.of(k).select(2, of_key),
          chunks.of(v).select(2, of_key),
          {.matrices = chunks.count,
           .queries = 0,
           .first = 0,
           .keys = 0,
           .scale = static_cast<float>(scale),
           .matrix_step = chunks.step * H,
           .query_step = H}};
}

// The number [B, L, H] of the first query of a block.
float* number_of(const at::Tensor& numbers, const Chunks& chunks, int64_t query, int64_t h) {
  return mutable_pointer<float>(numbers) + (chunks.first + query) * numbers.size(2) + h;
}

void forward_head(Head head, const Chunks& chunks, int64_t h, const at::Tensor& lse, const at::Tensor& o) {
  for (int64_t first = 0; first < chunks.length; first += kBlock) {
    const auto scores = head.block(first);
    const auto weights = at::empty(scores.sizes(), o.options());
    launch_typed(o, [&]<class T>(T*, cudaStream_t stream) {
      cuda::causal_softmax(head.scores, pointer<float>(scores), mutable_pointer<T>(weights),
                           number_of(lse, chunks, first, h), stream);
    });
    auto out = o.narrow(1, first, head.scores.queries);
    at::bmm_out(out, weights, head.v.narrow(1, 0, head.scores.keys));
  }
}

struct Gradients {
  at::Tensor dq, dk, dv;  // [count, length, d]
};

void backward_head(Head head, const Chunks& chunks, int64_t h, const at::Tensor& lse, const at::Tensor& delta,
                   const at::Tensor& d_o, const Gradients& out) {
  const int64_t c = chunks.length;
  const auto weights = at::empty({chunks.count, c, c}, d_o.options()), d_scores = at::empty_like(weights);
  for (int64_t first = 0; first < c; first += kBlock) {
    const auto scores = head.block(first);
    const int64_t queries = head.scores.queries, keys = head.scores.keys;
    const auto d_weights =
        product_in_float(d_o.narrow(1, first, queries), head.v.narrow(1, 0, keys).transpose(1, 2));
    launch_typed(d_o, [&]<class T>(T*, cudaStream_t stream) {
      cuda::causal_softmax_backward(head.scores, pointer<float>(scores), pointer<float>(d_weights),
                                    number_of(lse, chunks, first, h), number_of(delta, chunks, first, h), c,
                                    mutable_pointer<T>(weights) + first * c,
                                    mutable_pointer<T>(d_scores) + first * c, stream);
    });
    auto dq = out.dq.narrow(1, first, queries);
    at::bmm_out(dq, d_scores.narrow(1, first, queries).narrow(2, 0, keys), head.k.narrow(1, 0, keys));
  }
  for (int64_t first = 0; first < c; first += kBlock) {  // of keys: the queries from the first on see them
    const int64_t keys = std::min(kBlock, c - first), queries = c - first;
    const auto seen = [&](const at::Tensor& x) {
      return x.narrow(1, first, queries).narrow(2, first, keys).transpose(1, 2);
    };
    auto dk = out.dk.narrow(1, first, keys), dv = out.dv.narrow(1, first, keys);
    at::bmm_out(dk, seen(d_scores), head.q.narrow(1, first, queries));
    at::bmm_out(dv, seen(weights), d_o.narrow(1, first, queries));
  }
}

bool is_wide(const Chunks& chunks, const at::Tensor& q, const at::Tensor& v) {
  const c10::cuda::CUDAGuard guard(q.device());
  return q.scalar_type() == at::kBFloat16 && cuda::has_wide_kernels(q.size(3), v.size(3), chunks.length);
}

// f(sizes, scratch, stream) for parts of the chunks, some heads each, whose weights fit in memory at once.
template <class F>
void launch_wide(const Chunks& chunks, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 double scale, bool gradients, F&& f) {
  const int64_t H = q.size(2), c = chunks.length;
  const int64_t most = std::clamp<int64_t>(kMostWeights / (c * c), 1, chunks.count * H);
  const int64_t heads = std::min(most, H), count = most / heads;
  const auto weights = at::empty({count, heads, c, c}, q.options());
  const auto d_scores = gradients ? at::empty_like(weights) : at::Tensor();
  const auto sums = at::empty({count, heads, c}, q.options().dtype(at::kFloat));
  const auto next = at::empty({2}, q.options().dtype(at::kInt));
  const cuda::WideScratch scratch{mutable_pointer<Bfloat16>(weights), mutable_pointer<Bfloat16>(d_scores),
                                  mutable_pointer<float>(sums), mutable_pointer<int>(next)};
  launch(q, [&](cudaStream_t stream) {
    for (int64_t i = 0; i < chunks.count; i += count) {
      for (int64_t h = 0; h < H; h += heads) {
        f(cuda::WideSizes{.positions = q.size(0) * q.size(1),
                          .count = std::min(count, chunks.count - i),
                          .length = c,
                          .first = chunks.first + i * chunks.step,
                          .step = chunks.step,
                          .H = H,
                          .Hkv = k.size(2),
                          .first_head = h,
                          .heads = std::min(heads, H - h),
                          .dv = v.size(3),
                          .scale = static_cast<float>(scale)},
          scratch, stream);
      }
    }
  });
}

// Puts what flash attention made of a run of chunks, [count, heads, length, d], into `whole` [B, L, heads,
// d], whose B and L are those of x: as it is where the run is all there is.
void place(const Chunks& chunks, const at::Tensor& part, const at::Tensor& x, at::Tensor& whole) {
  const auto by_position = part.transpose(1, 2);
  const std::array sizes{x.size(0), x.size(1), part.size(1), part.size(3)};
  if (chunks.count * chunks.length == x.size(0) * x.size(1)) {
    whole = by_position.reshape(sizes);
    return;
  }
  if (!whole.defined()) whole = at::empty(sizes, part.options());
  chunks.of(whole).copy_(by_position);
}

// Of the runs of chunks one after the other, each as torch's flash attention has it: o, and the logarithms of
// the softmax's denominators, flat: [count, H, length] of each run.
Pair flash_forward(const std::vector<Chunks>& runs, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& v, double scale) {
  std::vector<at::Tensor> lse;
  at::Tensor o;
  for (const auto& chunks : runs) {
    const auto by_head = [&](const at::Tensor& x) { return chunks.of(x).transpose(1, 2); };
    const auto result = at::_scaled_dot_product_flash_attention(by_head(q), by_head(k), by_head(v), 0,
                                                                /*is_causal=*/true, false, scale);
    lse.push_back(std::get<1>(result).flatten());
    place(chunks, std::get<0>(result), q, o);
  }
  return {o, lse.size() == 1 ? lse[0] : at::cat(lse)};
}

Triple flash_backward(const std::vector<Chunks>& runs, const at::Tensor& q, const at::Tensor& k,
                      const at::Tensor& v, const at::Tensor& o, const at::Tensor& lse, const at::Tensor& d_o,
                      double scale) {
  const auto no_dropout = at::empty({2}, q.options().dtype(at::kLong));
  at::Tensor dq, dk, dv;
  int64_t first = 0;
  for (const auto& chunks : runs) {
    const auto by_head = [&](const at::Tensor& x) { return chunks.of(x).transpose(1, 2); };
    const auto lse_part = lse.narrow(0, first, chunks.count * q.size(2) * chunks.length)
                              .view({chunks.count, q.size(2), chunks.length});
    const auto parts = at::_scaled_dot_product_flash_attention_backward(
        by_head(d_o), by_head(q), by_head(k), by_head(v), by_head(o), lse_part, {}, {}, chunks.length,
        chunks.length, 0, /*is_causal=*/true, no_dropout, no_dropout, scale);
    first += lse_part.numel();
    place(chunks, std::get<0>(parts), q, dq);
    place(chunks, std::get<1>(parts), k, dk);
    place(chunks, std::get<2>(parts), v, dv);
  }
  return {dq, dk, dv};
}

// o, and the logarithms of the softmax's denominators: [B, L, H], or as flash_forward has them.
Pair forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& /*start*/,
             const Optional& /*cache_k*/, const Optional& /*cache_v*/, int64_t chunk,
             int64_t /*previous_chunks*/, double scale, double /*dropout*/, int64_t /*dropout_key*/) {
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2);
  const bool empty = B * L * H * v.size(3) == 0;
  const bool small = is_small(q, v, chunk), flash = !empty && !small && is_flash(q, v);
  const auto laid = [&](const at::Tensor& x) { return small || flash ? in_rows(x) : aligned(x, 8); };
  const auto q_ = laid(q), k_ = laid(k), v_ = laid(v);
  if (flash) return flash_forward(chunks_of(B, L, chunk), q_, k_, v_, scale);
  const auto o = at::empty({B, L, H, v.size(3)}, q.options());
  const auto lse = at::empty({B, L, H}, q.options().dtype(at::kFloat));
  if (empty) return {o, lse};
  for (const auto& run : chunks_of(B, L, chunk)) {
    if (small) {
      launch(q, [&](cudaStream_t stream) {
        cuda::small_forward(small_sizes(run, q, k, scale),
                            {small_heads(q_), small_heads(k_), small_heads(v_)}, mutable_pointer<Bfloat16>(o),
                            mutable_pointer<float>(lse), stream);
      });
      continue;
    }
    if (is_wide(run, q, v)) {
      launch_wide(
          run, q_, k_, v_, scale, false, [&](const auto& sizes, const auto& scratch, cudaStream_t stream) {
            cuda::wide_forward(sizes, pointer<Bfloat16>(q_), pointer<Bfloat16>(k_), pointer<Bfloat16>(v_),
                               scratch, mutable_pointer<Bfloat16>(o), mutable_pointer<float>(lse), stream);
          });
      continue;
    }
    for (const auto& chunks : within_memory(run)) {
      for (int64_t h = 0; h < H; ++h)
        forward_head(head_of(chunks, q_, k_, v_, h, scale), chunks, h, lse, chunks.of(o).select(2, h));
    }
  }
  return {o, lse};
}

Triple backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& /*start*/,
                const at::Tensor& o, const at::Tensor& lse, const at::Tensor& d_o, int64_t chunk,
                int64_t /*previous_chunks*/, double scale, double /*dropout*/, int64_t /*dropout_key*/) {
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), Hkv = k.size(2);
  if (o.numel() == 0) return {at::zeros_like(q), at::zeros_like(k), at::zeros_like(v)};
  const bool small = is_small(q, v, chunk), flash = !small && is_flash(q, v);
  const auto laid = [&](const at::Tensor& x) { return small || flash ? in_rows(x) : aligned(x, 8); };
  const auto q_ = laid(q), k_ = laid(k), v_ = laid(v), d_o_ = aligned(d_o, 8);
  if (flash) return flash_backward(chunks_of(B, L, chunk), q_, k_, v_, o, lse, d_o_, scale);
  const auto made = gradients_of_heads(k_, v_, q_);
  const auto &dk = made[0], &dv = made[1], &dq = made[2];
  const auto delta = small ? at::Tensor() : at::empty_like(lse);
  if (!small) {
    launch_typed(q, [&]<class T>(T*, cudaStream_t stream) {
      cuda::row_products(pointer<T>(o), pointer<T>(d_o_), delta.numel(), o.size(3),
                         mutable_pointer<float>(delta), stream);
    });
  }
  for (const auto& run : chunks_of(B, L, chunk)) {
    if (small) {
      launch(q, [&](cudaStream_t stream) {
        cuda::small_backward(
            small_sizes(run, q, k, scale), {small_heads(q_), small_heads(k_), small_heads(v_)},
            pointer<Bfloat16>(o), pointer<float>(lse), pointer<Bfloat16>(d_o_),
            {mutable_small_heads(dq), mutable_small_heads(dk), mutable_small_heads(dv)}, stream);
      });
      continue;
    }
    if (is_wide(run, q, v)) {
      launch_wide(run, q_, k_, v_, scale, true,
                  [&](const auto& sizes, const auto& scratch, cudaStream_t stream) {
                    cuda::wide_backward(sizes, pointer<Bfloat16>(q_), pointer<Bfloat16>(k_),
                                        pointer<Bfloat16>(v_), pointer<float>(lse), pointer<float>(delta),
                                        pointer<Bfloat16>(d_o_), scratch, mutable_pointer<Bfloat16>(dq),
                                        mutable_pointer<Bfloat16>(dk), mutable_pointer<Bfloat16>(dv), stream);
                  });
      continue;
    }
    for (const auto& chunks : within_memory(run)) {
      for (int64_t h = 0; h < H; ++h) {
        const auto of_head = [&](const at::Tensor& x) { return chunks.of(x).select(2, h); };
        backward_head(head_of(chunks, q_, k_, v_, h, scale), chunks, h, lse, delta, of_head(d_o_),
                      {of_head(dq), of_head(dk), of_head(dv)});
      }
    }
  }
  return {dq, sum_over_groups(dk, Hkv), sum_over_groups(dv, Hkv)};
}

at::Tensor over_cache(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                      const at::Tensor& cache_k, const at::Tensor& cache_v, int64_t chunk,
                      int64_t previous_chunks, double scale, bool stores) {
  const auto in_packs = [](const at::Tensor& x) { return aligned(x, 16 / x.element_size()); };
  const auto q_ = in_rows(q), k_ = in_rows(k), v_ = in_rows(v), start_ = start.contiguous();
  const auto cache_k_ = in_packs(cache_k), cache_v_ = in_packs(cache_v);
  cuda::CachedSizes sizes{
      q.size(0),        q.size(1),        q.size(2),       k.size(2),       q.size(3),
      v.size(3),        cache_k.size(1),  chunk,           previous_chunks, static_cast<float>(scale),
      row_of_heads(q_), row_of_heads(k_), row_of_heads(v_)};
  const auto o = at::empty({sizes.B, sizes.L, sizes.H, sizes.dv}, q.options());
  if (o.numel() == 0) return o;
  launch_typed(q, [&]<class T>(T*, cudaStream_t stream) {
    sizes.stores = stores && cuda::cached_attention_stores<T>(sizes);
    const int64_t rows = sizes.B * sizes.L * sizes.H, splits = cuda::cached_splits<T>(sizes);
    const auto parts =
        splits > 1 ? at::empty({rows, splits, sizes.dv + 2}, q.options().dtype(at::kFloat)) : at::Tensor();
    const cuda::CachedInputs<T> in{pointer<T>(q_),
                                   pointer<T>(k_),
                                   pointer<T>(v_),
                                   pointer<int64_t>(start_),
                                   mutable_pointer<T>(cache_k_),
                                   mutable_pointer<T>(cache_v_)};
    cuda::cached_attention(sizes, in, splits, mutable_pointer<float>(parts), mutable_pointer<T>(o), stream);
  });
  if (stores && !sizes.stores) {
    static const auto store =
        registered<void(at::TensorList, at::TensorList, const at::Tensor&)>("megalodon::cache_store");
    store.call({cache_k, cache_v}, {k, v}, start);
  }
  return o;
}

at::Tensor attend_and_store(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& start, const at::Tensor& cache_k, const at::Tensor& cache_v,
                            int64_t chunk, int64_t previous_chunks, double scale) {
  return over_cache(q, k, v, start, cache_k, cache_v, chunk, previous_chunks, scale, true);
}

at::Tensor infer(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                 const Optional& cache_k, const Optional& cache_v, int64_t chunk, int64_t previous_chunks,
                 double scale, double dropout, int64_t dropout_key) {
  if (cache_k && cache_v)
    return over_cache(q, k, v, start, *cache_k, *cache_v, chunk, previous_chunks, scale, false);
  return std::get<0>(
      forward(q, k, v, start, cache_k, cache_v, chunk, previous_chunks, scale, dropout, dropout_key));
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("attention", &infer);
  m.impl("attention_and_store", &attend_and_store);
  m.impl("attention_forward", &forward);
  m.impl("attention_backward", &backward);
}

}  // namespace megalodon::ops
