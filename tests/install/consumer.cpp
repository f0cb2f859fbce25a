#include <ATen/ATen.h>

#include <cstdio>

#include "model/config.h"
#include "ops/swiglu/swiglu.h"

int main() {
  const auto y = megalodon::ops::swiglu(at::ones({1}));  // silu(1)
  std::printf("%.6f\n", y.item<double>());
}
