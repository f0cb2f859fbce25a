#include "ops/query_key/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/query_key/cpu.cpp"
#include <hwy/foreach_target.h>

#include <cmath>

#include "base/parallel.h"
#include "ops/column_sums.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

template <class T>
HWY_INLINE float inverse_rms(const T* HWY_RESTRICT z, std::int64_t dz, double eps) {
  auto squares = hn::Zero(kFloat);
  for_vectors(dz, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto z_i = load(z + i, part);
    squares = hn::MulAdd(z_i, z_i, squares);
  });
  return 1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(dz) + static_cast<float>(eps));
}

// (a, b) -> (a, b) cos + (b, a) sin for each pair of x(i) (ops/rope/kernel.h); turned back where sin is
// negated.
template <class F>
HWY_INLINE FloatVec rotate(F&& x, std::int64_t i, FloatVec cos, FloatVec sin) {
  return hn::MulAdd(x(i), cos, hn::Mul(exchanged(x, i), sin));
}

// One token.
template <class T>
void forward(const cpu::QueryKeySizes& sizes, const T* HWY_RESTRICT z, const float* HWY_RESTRICT gamma,
             const float* HWY_RESTRICT beta, const float* HWY_RESTRICT rotation, T* HWY_RESTRICT q,
             T* HWY_RESTRICT k) {
  const std::int64_t dz = sizes.dz, Z = sizes.H * dz;
  const auto scale = hn::Set(kFloat, static_cast<float>(1 / std::sqrt(static_cast<double>(dz))));
  for (std::int64_t head = 0; head < Z; head += dz) {
    const auto r = hn::Set(kFloat, inverse_rms(z + head, dz, sizes.eps));
    for_vectors(dz, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto cos = load(rotation + i, part), sin = load(rotation + dz + i, part);
      const auto affine = [&](std::int64_t at) HWY_ATTR {  // by gamma, beta from `at` on
        return [&, at](std::int64_t j) HWY_ATTR {
          const auto normal = hn::Mul(hn::Mul(load(z + head + j, part), r), scale);
          return hn::Add(hn::MulAdd(normal, load(gamma + at + j, part), normal), load(beta + at + j, part));
        };
      };
      store(rotate(affine(head), i, cos, sin), q + head + i, part);
      store(rotate(affine(Z + head), i, cos, sin), k + head + i, part);
    });
  }
}

// One token. With z' = z r, and u the gradients of q and k turned back: d_beta += u, d_gamma += u
// z'/sqrt(dz), g = (u_q (1 + gamma_q) + u_k (1 + gamma_k))/sqrt(dz), d_z = r (g - z' mean(g z')).
template <class T>
void backward(const cpu::QueryKeySizes& sizes, const T* HWY_RESTRICT z, const float* HWY_RESTRICT gamma,
              const float* HWY_RESTRICT rotation, const T* HWY_RESTRICT dq, const T* HWY_RESTRICT dk,
              T* HWY_RESTRICT d_z, float* HWY_RESTRICT sums, float* HWY_RESTRICT g) {
  const std::int64_t dz = sizes.dz, Z = sizes.H * dz;
  const auto scale = hn::Set(kFloat, static_cast<float>(1 / std::sqrt(static_cast<double>(dz))));
  for (std::int64_t head = 0; head < Z; head += dz) {
    const auto r = hn::Set(kFloat, inverse_rms(z + head, dz, sizes.eps));
    auto dot = hn::Zero(kFloat);
    for_vectors(dz, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto normal = hn::Mul(load(z + head + i, part), r);
      const auto cos = load(rotation + i, part), back = hn::Neg(load(rotation + dz + i, part));
      const auto half = [&](const T* dy, std::int64_t at) HWY_ATTR {  // u (1 + gamma)/sqrt(dz)
        const auto row = [&](std::int64_t j) HWY_ATTR { return load(dy + head + j, part); };
        const auto u = rotate(row, i, cos, back), scaled = hn::Mul(u, scale);
        float* const d_gamma = sums + at;
        float* const d_beta = sums + 2 * Z + at;
        store(hn::MulAdd(scaled, normal, load(d_gamma, part)), d_gamma, part);
        store(hn::Add(u, load(d_beta, part)), d_beta, part);
        return hn::MulAdd(scaled, load(gamma + at, part), scaled);
      };
      const auto g_i = hn::Add(half(dq, head + i), half(dk, Z + head + i));
      store(g_i, g + i, part);
      dot = hn::MulAdd(g_i, normal, dot);
    });
    const auto pull = hn::Mul(r, hn::Set(kFloat, sum_of_lanes(dot) / static_cast<float>(dz)));
    for_vectors(dz, [&](std::int64_t i, auto part) HWY_ATTR {
      store(hn::Mul(r, hn::NegMulAdd(load(z + head + i, part), pull, load(g + i, part))), d_z + head + i,
            part);
    });
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

template <class T>
void query_key_forward(const QueryKeySizes& sizes, const T* z, const float* gamma, const float* beta,
                       const Rotations& rotations, T* q, T* k) {
  const auto kernel = MEGALODON_DISPATCH(forward<T>);
  const std::int64_t L = sizes.L, Z = sizes.H * sizes.dz;
  parallel_for(sizes.B * L, grain_of_rows(Z + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernel(sizes, z + row * Z, gamma, beta, rotations.of(row / L, row % L), q + row * Z, k + row * Z);
  });
}

template <class T>
void query_key_backward(const QueryKeySizes& sizes, const T* z, const float* gamma,
                        const Rotations& rotations, const T* dq, const T* dk, T* dz, double* sums) {
  const auto kernel = MEGALODON_DISPATCH(backward<T>);
  const std::int64_t L = sizes.L, Z = sizes.H * sizes.dz;
  for_row_blocks(sizes.B * L, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    ColumnSums block_sums(4 * Z, sums + block * 4 * Z);
    std::vector<float> g(static_cast<std::size_t>(sizes.dz));
    for (std::int64_t row = begin; row < end; ++row) {
      kernel(sizes, z + row * Z, gamma, rotations.of(row / L, row % L), dq + row * Z, dk + row * Z,
             dz + row * Z, block_sums.recent(), g.data());
      block_sums.count_row();
    }
    block_sums.finish();
  });
}

template void query_key_forward(const QueryKeySizes&, const float*, const float*, const float*,
                                const Rotations&, float*, float*);
template void query_key_forward(const QueryKeySizes&, const Bfloat16*, const float*, const float*,
                                const Rotations&, Bfloat16*, Bfloat16*);
template void query_key_backward(const QueryKeySizes&, const float*, const float*, const Rotations&,
                                 const float*, const float*, float*, double*);
template void query_key_backward(const QueryKeySizes&, const Bfloat16*, const float*, const Rotations&,
                                 const Bfloat16*, const Bfloat16*, Bfloat16*, double*);

}  // namespace megalodon::ops::cpu
#endif
