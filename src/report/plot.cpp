#include "report/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "report/svg.h"

namespace megalodon::report {
namespace {

constexpr double kWidth = 480;
constexpr double kTallest = 640;     // of a heat map's cells, as far as they can be shrunk
constexpr double kLabelHeight = 15;  // rows closer than that are not all named

struct Colour {
  double red, green, blue;
};

// A scale from dark blue to yellow whose lightness rises evenly, so that it reads the same for everyone.
Colour scale_colour(double share) {
  static constexpr std::array<Colour, 5> stops = {
      {{10, 36, 92}, {64, 78, 124}, {122, 124, 126}, {190, 174, 104}, {252, 226, 72}}};
  const double at = std::clamp(share, 0.0, 1.0) * (stops.size() - 1);
  const std::size_t below = std::min(static_cast<std::size_t>(at), stops.size() - 2);
  const double part = at - static_cast<double>(below);
  const auto mix = [&](double a, double b) { return a + part * (b - a); };
  const Colour &a = stops[below], &b = stops[below + 1];
  return {mix(a.red, b.red), mix(a.green, b.green), mix(a.blue, b.blue)};
}

std::string fill(double share) {
  const Colour colour = scale_colour(share);
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "fill=\"#%02x%02x%02x\"", static_cast<unsigned>(colour.red),
                static_cast<unsigned>(colour.green), static_cast<unsigned>(colour.blue));
  return text.data();
}

// Two decimals of the colour scale's range, the same for every cell.
std::string in_cell(double value, const HeatMap& map) {
  const int decimals = std::clamp(2 - static_cast<int>(std::floor(std::log10(map.high - map.low))), 0, 6);
  std::array<char, 400> text{};
  std::snprintf(text.data(), text.size(), "%.*f", decimals, value);
  return text.data();
}

double widest_of(const std::vector<std::string>& names) {
  double widest = 0;
  for (const std::string& name : names) widest = std::max(widest, text_width(name));
  return widest;
}

// The bar that explains the colours of a heat map.
void draw_scale(Svg& svg, const HeatMap& map, double left, double right, double top) {
  constexpr int steps = 24;
  const double width = std::min(160.0, right - left) / steps;
  for (int i = 0; i < steps; ++i) {
    svg.rect(left + i * width, top, width + 0.5, 10, "cell", {}, fill(i / (steps - 1.0)));
  }
  svg.text(left, top + 25, short_number(map.low, 3), Anchor::start, "tick");
  svg.text(left + steps * width, top + 25, short_number(map.high, 3), Anchor::end, "tick");
}

}  // namespace

std::string draw(const HeatMap& map) {
  const double left = std::clamp(widest_of(map.rows) + 12, 30.0, 160.0), top = 52;
  const double cell_width =
      std::min(72.0, (kWidth - left - 2) / std::max<double>(1, static_cast<double>(map.columns.size())));
  const double cell_height =
      std::clamp(kTallest / std::max<double>(1, static_cast<double>(map.rows.size())), 5.0, 26.0);
  const double gap = cell_height < 10 ? 0.5 : 1;
  const double bottom = top + cell_height * static_cast<double>(map.rows.size());
  Svg svg(kWidth, bottom + 82, map.title);
  svg.text(0, 15, map.title, Anchor::start, "title");
  svg.text(0, 40, map.y_label, Anchor::start, "label");
  const bool numbers = cell_width >= 34 && cell_height >= 16;
  const auto rows_a_name = static_cast<std::size_t>(std::ceil(kLabelHeight / cell_height));
  const auto columns_a_name = static_cast<std::size_t>(std::ceil((widest_of(map.columns) + 6) / cell_width));
  for (std::size_t row = 0; row < map.rows.size(); ++row) {
    const double y = top + cell_height * static_cast<double>(row);
    if (row % rows_a_name == 0) {
      svg.text(left - 8, y + cell_height / 2 + 5, map.rows[row], Anchor::end, "tick");
    }
    for (std::size_t column = 0; column < map.columns.size(); ++column) {
      const double value = map.values[row][column];
      const double share = (value - map.low) / (map.high - map.low);
      const double x = left + cell_width * static_cast<double>(column);
      const std::string hover = map.y_label + " " + map.rows[row] + ", " + map.x_label + " " +
                                map.columns[column] + ": " + rounded(value, 4);
      if (!std::isfinite(share)) {
        svg.rect(x, y, cell_width - gap, cell_height - gap, "nothing", hover);
        continue;
      }
      svg.rect(x, y, cell_width - gap, cell_height - gap, "cell", hover, fill(share));
      if (numbers) {
        svg.text(x + cell_width / 2, y + cell_height / 2 + 4.5, in_cell(value, map), Anchor::middle,
                 share > 0.5 ? "in-cell dark" : "in-cell light");
      }
    }
  }
  for (std::size_t column = 0; column < map.columns.size(); column += columns_a_name) {
    const double x = left + cell_width * (static_cast<double>(column) + 0.5);
    svg.text(x, bottom + 16, map.columns[column], Anchor::middle, "tick");
  }
  svg.text(left, bottom + 38, map.x_label, Anchor::start, "label");
  draw_scale(svg, map, left, kWidth, bottom + 48);
  return svg.finish();
}

std::string draw(const BarChart& chart) {
  std::vector<std::string> names;
  std::vector<double> values;
  for (const auto& [name, value] : chart.bars) {
    names.push_back(name);
    values.push_back(value);
  }
  values.push_back(0);
  const Axis axis = make_axis(values, Scale::linear, 0, 5);
  const double left = std::clamp(widest_of(names) + 10, 30.0, 200.0), right = kWidth - 66, top = 54, row = 30;
  Svg svg(kWidth, top + row * static_cast<double>(chart.bars.size()) + 8, chart.title);
  svg.text(0, 15, chart.title, Anchor::start, "title");
  svg.text(0, 38, chart.label, Anchor::start, "label");
  for (std::size_t i = 0; i < chart.bars.size(); ++i) {
    const auto& [name, value] = chart.bars[i];
    const double y = top + row * static_cast<double>(i);
    svg.text(left - 8, y + 16, name, Anchor::end, "name");
    const double length = std::isfinite(value) ? std::max(0.0, value / axis.high) * (right - left) : 0;
    svg.rect(left, y, length, row - 8, "bar s0", name + ": " + rounded(value, 6));
    svg.text(left + length + 6, y + 16, short_number(value, 4), Anchor::start, "name");
  }
  svg.line(left, top - 4, left, top + row * static_cast<double>(chart.bars.size()) - 4, "axis");
  return svg.finish();
}

std::string_view chart_style() {
  return R"css(
:root { --ink: #1c2330; --soft: #566073; --rule: #e3e7ee; --axis: #9aa4b5; --page: #ffffff; --card: #f6f8fb;
  --s0: #0b67a8; --s1: #c24e00; --s2: #00785a; --s3: #a3437c; --s4: #7a6500; --s5: #4a4ad0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf3; --soft: #a7b1c2; --rule: #2b323e; --axis: #687386;
  --page: #12161d; --card: #1a202a;
  --s0: #5bb5f0; --s1: #ff9a57; --s2: #41cb9d; --s3: #e79bc6; --s4: #e5c93f; --s5: #a9a9ff; } }
.chart { display: block; width: 100%; height: auto; overflow: visible; font-size: 12.5px; }
.chart text { fill: var(--soft); font-family: inherit; font-variant-numeric: tabular-nums; }
.chart .title { fill: var(--ink); font-weight: 600; font-size: 1.16em; }
.chart .name { fill: var(--ink); }
.chart .end { font-weight: 600; }
.chart .grid { stroke: var(--rule); }
.chart .axis { stroke: var(--axis); }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .faint { fill: none; stroke-width: 1; opacity: 0.35; }
.chart .band { stroke: none; opacity: 0.22; }
.chart .marker { stroke: var(--page); stroke-width: 1; }
.chart .hover { fill: var(--ink); fill-opacity: 0; }
.chart .hover:hover { fill-opacity: 0.08; }
.chart .nothing { fill: var(--rule); }
.chart .in-cell { font-size: 0.92em; }
.chart .in-cell.dark { fill: #10151d; }
.chart .in-cell.light { fill: #ffffff; }
.chart .line.s1 { stroke-dasharray: 7 3; }
.chart .line.s2 { stroke-dasharray: 2 3; }
.chart .line.s3 { stroke-dasharray: 10 3 2 3; }
.chart .line.s4 { stroke-dasharray: 4 2; }
.chart .line.s5 { stroke-dasharray: 12 4; }
.chart .line.s0, .chart .faint.s0 { stroke: var(--s0); }
.chart .line.s1, .chart .faint.s1 { stroke: var(--s1); }
.chart .line.s2, .chart .faint.s2 { stroke: var(--s2); }
.chart .line.s3, .chart .faint.s3 { stroke: var(--s3); }
.chart .line.s4, .chart .faint.s4 { stroke: var(--s4); }
.chart .line.s5, .chart .faint.s5 { stroke: var(--s5); }
.chart .marker.s0, .chart .band.s0, .chart .end.s0, .chart .bar.s0 { fill: var(--s0); }
.chart .marker.s1, .chart .band.s1, .chart .end.s1 { fill: var(--s1); }
.chart .marker.s2, .chart .band.s2, .chart .end.s2 { fill: var(--s2); }
.chart .marker.s3, .chart .band.s3, .chart .end.s3 { fill: var(--s3); }
.chart .marker.s4, .chart .band.s4, .chart .end.s4 { fill: var(--s4); }
.chart .marker.s5, .chart .band.s5, .chart .end.s5 { fill: var(--s5); }
@media (max-width: 560px) { .chart { font-size: 15.5px; } }
)css";
}

}  // namespace megalodon::report
