#pragma once
#include <cstdint>
#include <string>

#include "base/config.h"

namespace megalodon::train {

// Learning rate by step: a linear warm-up to the peak, then
//   cosine:  half a cosine from the peak to final_fraction of it at the last step,
//   linear:  a line to the same end,
//   wsd:     the peak until `decay_steps` before the end, then half a cosine to the same end (warm-up,
//   stable, decay).
struct Schedule {
  std::string type = "cosine";
  double peak = 0;
  int64_t steps = 0;
  int64_t warmup_steps = 0;
  int64_t decay_steps = 0;  // wsd alone
  double final_fraction = 0.1;

  double rate(int64_t step) const;  // step counts from 0
};

Schedule read_schedule(Config& config, int64_t steps);

}  // namespace megalodon::train
