#include "train/schedule.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <string_view>

namespace megalodon::train {

double Schedule::rate(int64_t step) const {
  if (step < warmup_steps) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup_steps);
  const int64_t start = type == "wsd" ? std::max(warmup_steps, steps - decay_steps) : warmup_steps;
  if (step < start) return peak;
  const double length = static_cast<double>(std::max<int64_t>(steps - start, 1));
  const double progress = std::min(1.0, static_cast<double>(step - start + 1) / length);
  const double left = type == "linear" ? 1 - progress : 0.5 * (1 + std::cos(std::numbers::pi * progress));
  return peak * (final_fraction + (1 - final_fraction) * left);
}

Schedule read_schedule(Config& config, int64_t steps) {
  constexpr std::array<std::string_view, 3> types{"cosine", "linear", "wsd"};
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  Schedule s;
  s.steps = steps;
  s.type = config.choice("schedule.type", types, "cosine");
  s.peak = config.number("schedule.learning_rate", 0, 1e3);
  s.warmup_steps = config.integer("schedule.warmup_steps", 0, most, std::min<int64_t>(steps / 20, 2500));
  if (s.type == "wsd") s.decay_steps = config.integer("schedule.decay_steps", 0, most, steps / 5);
  s.final_fraction = config.number("schedule.final_fraction", 0, 1, 0.1);
  if (s.warmup_steps > steps) {
    config.fail("schedule.warmup_steps", "longer than the run of " + std::to_string(steps) + " steps",
                "lower it");
  }
  return s;
}

}  // namespace megalodon::train
