#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/column_sum/column_sum.h"

namespace megalodon::ops {

at::Tensor column_sum_reference(const at::Tensor& x) {
  return x.sum(0, /*keepdim=*/false, statistics_type(x));
}

}  // namespace megalodon::ops
