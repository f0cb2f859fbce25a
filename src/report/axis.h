#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace megalodon::report {

enum class Scale { linear, logarithmic };

struct Tick {
  double value;
  std::string label;
};

// One axis of a chart: a range of numbers, where each lies along the axis, and the ticks to draw.
struct Axis {
  double low = 0, high = 1;
  Scale scale = Scale::linear;
  std::vector<Tick> ticks;

  // 0 at `low`, 1 at `high`; NaN for what the axis cannot show (not finite; not positive on a logarithmic
  // one).
  double place(double value) const;
};

// An axis over the values that it can show, widened by the share `padding` of its length at both ends, with
// about `count` round ticks. Where no value can be shown: the range 0 .. 1 (1 .. 10). Where all are the same:
// a range around it.
Axis make_axis(std::span<const double> values, Scale scale, double padding, int count);

// "1,234,567".
std::string grouped(std::int64_t number);
// `number` with `digits` significant digits, without exponent between 1e-4 and 1e15, grouped above 9999; "–"
// where it is not finite.
std::string rounded(double number, int digits);
// For the ends of ticks and lines, at most 6 or so characters: "0.25", "1500", "12.4k", "1.5M", "3e-05".
std::string short_number(double number, int digits);

}  // namespace megalodon::report
