#pragma once
#include <ATen/ATen.h>

#include <utility>
#include <vector>

namespace megalodon::ops {

// What `parts` are pieces of along dimension `dim`, one after the other in memory; undefined where they lie
// otherwise.
inline at::Tensor joined(at::ArrayRef<at::Tensor> parts, int64_t dim) {
  const auto& first = parts[0];
  if (!first.defined()) return {};
  auto sizes = first.sizes().vec();
  auto& size = sizes[static_cast<std::size_t>(dim < 0 ? dim + first.dim() : dim)];
  for (const auto& part : parts.slice(1)) {
    if (!part.defined() || !part.is_alias_of(first) || part.strides() != first.strides() ||
        part.storage_offset() != first.storage_offset() + size * first.stride(dim)) {
      return {};
    }
    const auto before = std::exchange(size, part.size(dim));
    if (part.sizes() != at::IntArrayRef(sizes)) return {};
    size += before;
  }
  return first.as_strided(sizes, first.strides(), first.storage_offset());
}

// Uninitialised tensors of the shapes of `parts`: pieces of one where these are.
inline std::vector<at::Tensor> empty_like_joined(at::ArrayRef<at::Tensor> parts, int64_t dim) {
  const auto like = joined(parts, dim);
  const auto whole = like.defined() ? at::empty(like.sizes(), like.options()) : at::Tensor();
  std::vector<at::Tensor> all;
  for (int64_t first = 0; const auto& part : parts) {
    all.push_back(whole.defined() ? whole.narrow(dim, first, part.size(dim))
                                  : at::empty(part.sizes(), part.options()));
    first += part.size(dim);
  }
  return all;
}

}  // namespace megalodon::ops
