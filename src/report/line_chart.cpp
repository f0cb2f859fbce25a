#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <set>

#include "report/plot.h"
#include "report/svg.h"

namespace megalodon::report {
namespace {

constexpr double kWidth = 480, kHeight = 310;
constexpr double kRight = 54, kBottom = 46, kTitle = 22, kLegendRow = 20;
constexpr std::size_t kColours = 6;
constexpr std::size_t kMarkedPoints = 24;  // series of at most this many points get markers
constexpr std::size_t kHoverStrips = 96;

struct Frame {
  double left, right, top, bottom;
  Axis x, y;
  double across(double value) const { return left + x.place(value) * (right - left); }
  double up(double value) const { return bottom - y.place(value) * (bottom - top); }
};

std::string series_class(std::string_view what, std::size_t index) {
  return std::string(what) + " s" + std::to_string(index % kColours);
}

bool drawn(double x, double y) {
  return std::isfinite(x) && std::isfinite(y);
}

// A polyline with a gap at every point that cannot be drawn.
std::string polyline(const Frame& frame, const std::vector<double>& xs, const std::vector<double>& ys) {
  std::string data;
  bool pen_down = false;
  for (std::size_t i = 0; i < xs.size(); ++i) {
    const double x = frame.across(xs[i]), y = frame.up(ys[i]);
    if (drawn(x, y)) data += (pen_down ? "L" : "M") + coordinate(x) + " " + coordinate(y);
    pen_down = drawn(x, y);
  }
  return data;
}

// The area between low and high, one closed piece for each stretch without a gap.
std::string band(const Frame& frame, const Series& series) {
  std::string data;
  std::vector<std::string> back;  // the lower edge of the piece that is being drawn
  const auto close = [&] {
    for (; !back.empty(); back.pop_back()) data += back.back();
    if (!data.empty() && data.back() != 'Z') data += 'Z';
  };
  for (std::size_t i = 0; i < series.low.size(); ++i) {
    const double x = frame.across(series.x[i]);
    const double low = frame.up(series.low[i]), high = frame.up(series.high[i]);
    if (!drawn(x, low) || !drawn(x, high)) {
      close();
      continue;
    }
    data += (back.empty() ? "M" : "L") + coordinate(x) + " " + coordinate(high);
    back.push_back("L" + coordinate(x) + " " + coordinate(low));
  }
  close();
  return data;
}

// A circle, square, triangle, diamond, ring of a plus ... by series.
void draw_marker(Svg& svg, double x, double y, std::size_t index) {
  static constexpr std::array<const char*, kColours> shapes = {
      "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
      "m-3.2 -3.2h6.4v6.4h-6.4Z",
      "m0 -4.2l4.2 7.4h-8.4Z",
      "m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6Z",
      "m0 4.2l4.2 -7.4h-8.4Z",
      "m-1.4 -4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8Z"};
  svg.path("M" + coordinate(x) + " " + coordinate(y) + shapes[index % kColours],
           series_class("marker", index));
}

std::vector<double> values_for_y_axis(const LineChart& chart) {
  std::vector<double> values;
  for (const Series& series : chart.series) {
    const std::vector<double> line = smoothed(series.y, series.smoothing);
    values.insert(values.end(), line.begin(), line.end());
    values.insert(values.end(), series.low.begin(), series.low.end());
    values.insert(values.end(), series.high.begin(), series.high.end());
    if (series.smoothing > 0 && series.low.empty()) {
      values.insert(values.end(), series.y.begin(), series.y.end());
    }
  }
  if (chart.y_from_zero && chart.y_scale == Scale::linear) values.push_back(0);
  return values;
}

Frame make_frame(const LineChart& chart, double top) {
  std::vector<double> xs;
  for (const Series& series : chart.series) xs.insert(xs.end(), series.x.begin(), series.x.end());
  const std::vector<double> ys = values_for_y_axis(chart);
  const bool marked = chart.x_ticks.empty();
  Frame frame{0,
              kWidth - kRight,
              top,
              kHeight - kBottom,
              make_axis(xs, chart.x_scale, marked ? 0 : 0.04, 5),
              make_axis(ys, chart.y_scale, 0.05, 5)};
  if (chart.y_from_zero && chart.y_scale == Scale::linear && frame.y.low < 0 &&
      std::none_of(ys.begin(), ys.end(), [](double y) { return y < 0; })) {
    frame.y.low = 0;
    std::erase_if(frame.y.ticks, [](const Tick& tick) { return tick.value < 0; });
  }
  if (!chart.x_ticks.empty()) {
    frame.x.ticks.clear();
    for (const double value : chart.x_ticks) {
      if (!(frame.x.place(value) >= 0 && frame.x.place(value) <= 1)) continue;
      const bool whole = value == std::floor(value) && std::abs(value) < 1e6;
      frame.x.ticks.push_back(
          {value, whole ? grouped(static_cast<std::int64_t>(value)) : short_number(value, 4)});
    }
  }
  double widest = 0;
  for (const Tick& tick : frame.y.ticks) widest = std::max(widest, text_width(tick.label));
  frame.left = std::max(42.0, widest + 14);
  return frame;
}

// Names with their colours above the plot, as many rows as they need; returns the height they take.
double draw_legend(Svg& svg, const LineChart& chart) {
  if (chart.series.size() < 2) return 0;
  double x = 0, y = kTitle + 14;
  for (std::size_t i = 0; i < chart.series.size(); ++i) {
    const double width = 30 + text_width(chart.series[i].name) + 16;
    if (x > 0 && x + width > kWidth) {
      x = 0;
      y += kLegendRow;
    }
    svg.line(x, y - 4, x + 22, y - 4, series_class("line", i));
    if (chart.series[i].x.size() <= kMarkedPoints) draw_marker(svg, x + 11, y - 4, i);
    svg.text(x + 28, y, chart.series[i].name, Anchor::start, "name");
    x += width;
  }
  return y - kTitle;
}

void draw_axes(Svg& svg, const LineChart& chart, const Frame& frame) {
  for (const Tick& tick : frame.y.ticks) {
    const double y = frame.up(tick.value);
    svg.line(frame.left, y, frame.right, y, "grid");
    svg.text(frame.left - 7, y + 4, tick.label, Anchor::end, "tick");
  }
  double free_from = 0;
  for (const Tick& tick : frame.x.ticks) {
    const double x = frame.across(tick.value), half = text_width(tick.label) / 2;
    svg.line(x, frame.bottom, x, frame.bottom + 4, "axis");
    if (x - half < free_from || x + half > kWidth) continue;
    svg.text(x, frame.bottom + 18, tick.label, Anchor::middle, "tick");
    free_from = x + half + 6;
  }
  svg.line(frame.left, frame.bottom, frame.right, frame.bottom, "axis");
  svg.text((frame.left + frame.right) / 2, kHeight - 8, chart.x_label, Anchor::middle, "label");
}

// Three digits of what is measured, the last zeros too, so that the ends of neighbouring lines compare.
std::string end_label(double value) {
  const double size = std::abs(value);
  if (value == std::floor(value)) return short_number(value, 4);  // a count
  return size >= 10000 || (size < 0.01 && size > 0) ? short_number(value, 3) : rounded(value, 3);
}

struct EndLabel {
  double y;
  std::string text;
  std::size_t index;
};

// The last value of every series beside its end, moved apart where they would overlap.
void draw_end_labels(Svg& svg, const Frame& frame, std::vector<EndLabel> labels) {
  constexpr double gap = 15;
  std::sort(labels.begin(), labels.end(), [](const EndLabel& a, const EndLabel& b) { return a.y < b.y; });
  for (std::size_t i = 1; i < labels.size(); ++i) labels[i].y = std::max(labels[i].y, labels[i - 1].y + gap);
  double limit = frame.bottom;
  for (std::size_t i = labels.size(); i-- > 0;) {
    labels[i].y = std::min(labels[i].y, limit);
    limit = labels[i].y - gap;
  }
  for (const EndLabel& label : labels) {
    svg.text(frame.right + 6, label.y + 4, label.text, Anchor::start, series_class("end", label.index));
  }
}

// One strip a neighbourhood of x; its hover text lists the value of every series there.
void draw_hover_strips(Svg& svg, const LineChart& chart, const Frame& frame) {
  std::set<double> places;
  for (const Series& series : chart.series) {
    for (const double x : series.x) {
      if (std::isfinite(frame.x.place(x))) places.insert(x);
    }
  }
  std::vector<double> xs(places.begin(), places.end());
  const std::size_t stride = (xs.size() + kHoverStrips - 1) / kHoverStrips;
  std::vector<double> chosen;
  for (std::size_t i = 0; i < xs.size(); i += stride) chosen.push_back(xs[i]);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const double here = frame.across(chosen[i]);
    const double begin = i == 0 ? frame.left : (frame.across(chosen[i - 1]) + here) / 2;
    const double end = i + 1 == chosen.size() ? frame.right : (here + frame.across(chosen[i + 1])) / 2;
    std::string hover = chart.x_label + " " + rounded(chosen[i], 6);
    for (const Series& series : chart.series) {
      const auto found = std::lower_bound(series.x.begin(), series.x.end(), chosen[i]);
      if (found == series.x.end()) continue;
      hover += "\n" + series.name + ": " +
               rounded(series.y[static_cast<std::size_t>(found - series.x.begin())], 4);
    }
    svg.rect(begin, frame.top, end - begin, frame.bottom - frame.top, "hover", hover);
  }
}

void draw_series(Svg& svg, const Series& series, const Frame& frame, std::size_t index,
                 std::vector<EndLabel>& labels) {
  const std::vector<double> line = smoothed(series.y, series.smoothing);
  svg.path(band(frame, series), series_class("band", index));
  if (series.smoothing > 0 && series.low.empty()) {
    svg.path(polyline(frame, series.x, series.y), series_class("faint", index));
  }
  svg.path(polyline(frame, series.x, line), series_class("line", index));
  std::size_t last = series.x.size();
  for (std::size_t i = 0; i < series.x.size(); ++i) {
    const double x = frame.across(series.x[i]), y = frame.up(line[i]);
    if (!drawn(x, y)) continue;
    last = i;
    if (series.x.size() <= kMarkedPoints) draw_marker(svg, x, y, index);
  }
  if (last < series.x.size()) labels.push_back({frame.up(line[last]), end_label(line[last]), index});
}

}  // namespace

std::string draw(const LineChart& chart) {
  Svg svg(kWidth, kHeight, chart.title);
  svg.text(0, 15, chart.title, Anchor::start, "title");
  const double legend = draw_legend(svg, chart);
  const Frame frame = make_frame(chart, kTitle + legend + 30);
  svg.text(0, frame.top - 9, chart.y_label, Anchor::start, "label");
  draw_axes(svg, chart, frame);
  std::vector<EndLabel> labels;
  for (std::size_t i = 0; i < chart.series.size(); ++i) draw_series(svg, chart.series[i], frame, i, labels);
  if (labels.empty()) {
    svg.text((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2, "no data", Anchor::middle,
             "label");
  } else {
    draw_end_labels(svg, frame, std::move(labels));
    draw_hover_strips(svg, chart, frame);
  }
  return svg.finish();
}

Series downsampled(const Series& series, std::size_t buckets) {
  if (series.x.size() <= buckets) return series;
  Series out{series.name, {}, {}, {}, {}, series.smoothing};
  constexpr double none = std::numeric_limits<double>::quiet_NaN();
  for (std::size_t bucket = 0; bucket < buckets; ++bucket) {
    const std::size_t begin = series.x.size() * bucket / buckets;
    const std::size_t end = series.x.size() * (bucket + 1) / buckets;
    double x = 0, sum = 0, low = none, high = none;
    std::size_t count = 0;
    for (std::size_t i = begin; i < end; ++i) {
      x += series.x[i] / static_cast<double>(end - begin);
      if (!std::isfinite(series.y[i])) continue;
      sum += series.y[i];
      low = count == 0 ? series.y[i] : std::min(low, series.y[i]);
      high = count == 0 ? series.y[i] : std::max(high, series.y[i]);
      ++count;
    }
    out.x.push_back(x);
    out.y.push_back(count == 0 ? none : sum / static_cast<double>(count));
    out.low.push_back(low);
    out.high.push_back(high);
  }
  return out;
}

std::vector<double> smoothed(const std::vector<double>& values, double smoothing) {
  if (smoothing <= 0) return values;
  std::vector<double> sums(values.size()), weights(values.size()), out(values);
  double sum = 0, weight = 0;
  const auto add = [&](std::size_t i) {
    const bool counts = std::isfinite(values[i]);
    sum = smoothing * sum + (counts ? values[i] : 0);
    weight = smoothing * weight + (counts ? 1 : 0);
  };
  for (std::size_t i = 0; i < values.size(); ++i) {
    add(i);
    sums[i] = sum;
    weights[i] = weight;
  }
  sum = weight = 0;
  for (std::size_t i = values.size(); i-- > 0;) {
    add(i);
    // The value itself is in both sums.
    if (std::isfinite(values[i])) out[i] = (sums[i] + sum - values[i]) / (weights[i] + weight - 1);
  }
  return out;
}

}  // namespace megalodon::report
