#include <ATen/ATen.h>

#include "ops/embedding/embedding.h"

namespace megalodon::ops {

at::Tensor embedding_reference(const at::Tensor& table, const at::Tensor& tokens) {
  return at::embedding(table, tokens);
}

}  // namespace megalodon::ops
