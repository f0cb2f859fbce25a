#include "report/axis.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

namespace megalodon::report {
namespace {

std::string printed(const char* format, int digits, double number) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), format, digits, number);
  return text.data();
}

// Drops zeros behind a decimal point.
std::string trimmed(std::string text) {
  if (text.find('.') == std::string::npos || text.find('e') != std::string::npos) return text;
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

// The nearest of 1, 2, 5 times a power of ten that is not below `step`.
double round_step(double step) {
  const double power = std::pow(10.0, std::floor(std::log10(step)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= step * (1 - 1e-9)) return factor * power;
  }
  return 10 * power;
}

std::vector<Tick> linear_ticks(double low, double high, int count) {
  const double step = round_step((high - low) / count);
  const double largest = std::max(std::abs(low), std::abs(high));
  // As many digits as tell neighbours apart.
  const int digits = std::clamp(static_cast<int>(std::floor(std::log10(largest / step) + 1e-9)) + 2, 1, 12);
  std::vector<Tick> ticks;
  const double first = std::ceil(low / step - 1e-9), last = std::floor(high / step + 1e-9);
  for (int i = 0; first + i <= last; ++i) {
    const double value = (first + i) * step;
    ticks.push_back({value, short_number(value, digits)});
  }
  return ticks;
}

std::vector<Tick> logarithmic_ticks(double low, double high, int count) {
  const double decades = std::log10(high) - std::log10(low);
  if (decades < 0.7) return linear_ticks(low, high, count);
  std::vector<Tick> ticks;
  const int stride = std::max(1, static_cast<int>(std::ceil(decades / (count + 1))));
  for (int power = static_cast<int>(std::floor(std::log10(low))); power <= std::log10(high); ++power) {
    if (power % stride != 0) continue;
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double value = factor * std::pow(10.0, power);
      if (factor > 1 && decades > 2.5) continue;
      if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) {
        ticks.push_back({value, short_number(value, 3)});
      }
    }
  }
  return ticks;
}

}  // namespace

double Axis::place(double value) const {
  if (!std::isfinite(value)) return std::numeric_limits<double>::quiet_NaN();
  if (scale == Scale::linear) return (value - low) / (high - low);
  if (value <= 0) return std::numeric_limits<double>::quiet_NaN();
  return (std::log(value) - std::log(low)) / (std::log(high) - std::log(low));
}

Axis make_axis(std::span<const double> values, Scale scale, double padding, int count) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const bool logarithmic = scale == Scale::logarithmic;
  double low = infinity, high = -infinity;
  // Beyond these sizes, ranges and the steps between ticks overflow or vanish.
  constexpr double largest = 1e150, smallest = 1e-150;
  for (double value : values) {
    if (!std::isfinite(value) || std::abs(value) > largest || (logarithmic && value < smallest)) continue;
    if (std::abs(value) < smallest) value = 0;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (low > high) {
    low = logarithmic ? 1 : 0;
    high = logarithmic ? 10 : 1;
  } else if (logarithmic) {
    const double least = 1.05;
    const double widened = high / low < least ? least : std::pow(high / low, padding);
    low /= widened;
    high *= widened;
  } else {
    const double least = std::max(std::abs(low), std::abs(high)) * 1e-6;
    double widened = (high - low) * padding;
    if (high - low <= least) widened = low == 0 ? 1 : std::abs(low) * 0.05;
    low -= widened;
    high += widened;
  }
  Axis axis{low, high, scale, {}};
  axis.ticks = logarithmic ? logarithmic_ticks(low, high, count) : linear_ticks(low, high, count);
  return axis;
}

std::string grouped(std::int64_t number) {
  std::string text = std::to_string(number);
  const int first = number < 0 ? 1 : 0;
  for (int at = static_cast<int>(text.size()) - 3; at > first; at -= 3) {
    text.insert(static_cast<std::size_t>(at), ",");
  }
  return text;
}

std::string rounded(double number, int digits) {
  if (!std::isfinite(number)) return "–";
  const double size = std::abs(number);
  if (number == 0) return "0";
  if (size < 1e-4 || size >= 1e15) return printed("%.*e", digits - 1, number);
  const int before = static_cast<int>(std::floor(std::log10(size))) + 1;
  if (before >= digits) {
    return size < 10000 ? printed("%.*f", 0, number) : grouped(std::llround(number));
  }
  return printed("%.*f", digits - before, number);
}

std::string short_number(double number, int digits) {
  if (!std::isfinite(number)) return "–";
  const double size = std::abs(number);
  if (number == 0) return "0";
  if (size < 1e-3 || size >= 1e15) return printed("%.*g", digits, number);
  static constexpr std::array<std::pair<double, const char*>, 4> units = {
      {{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}}};
  for (const auto& [unit, letter] : units) {
    if (size >= unit && size >= 10000) {
      const int before = static_cast<int>(std::floor(std::log10(size / unit))) + 1;
      return trimmed(printed("%.*f", std::max(0, digits - before), number / unit)) + letter;
    }
  }
  const int before = static_cast<int>(std::floor(std::log10(size))) + 1;
  return trimmed(printed("%.*f", std::max(0, digits - before), number));
}

}  // namespace megalodon::report
