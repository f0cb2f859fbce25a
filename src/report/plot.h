#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "report/axis.h"

namespace megalodon::report {

// Charts as inline SVG: no scripts, no network. Colours come from the style sheet chart_style(), which
// follows the reader's light or dark scheme and stays distinct under the common colour-vision deficiencies;
// series differ by dashes and markers too. Values that are not finite leave gaps. Titles and names are
// escaped here.

struct Series {
  std::string name;
  std::vector<double> x, y;       // of one length, x ascending
  std::vector<double> low, high;  // a band around y, drawn pale; both empty or as long as y
  double smoothing = 0;           // in [0, 1): drawn in place of y is smoothed(y, smoothing)
};

struct LineChart {
  std::string title, x_label, y_label;
  Scale x_scale = Scale::linear, y_scale = Scale::linear;
  bool y_from_zero = false;     // on a linear axis
  std::vector<double> x_ticks;  // where not empty: ticks there, in place of round numbers
  std::vector<Series> series;
};

struct HeatMap {
  std::string title, x_label, y_label;
  std::vector<std::string> columns, rows;   // names
  std::vector<std::vector<double>> values;  // [rows, columns]; NaN: no value
  double low = 0, high = 1;                 // the ends of the colour scale
};

struct BarChart {
  std::string title, label;
  std::vector<std::pair<std::string, double>> bars;  // values below zero are drawn as zero
};

std::string draw(const LineChart& chart);
std::string draw(const HeatMap& map);
std::string draw(const BarChart& chart);

// The style sheet of all charts, once a page.
std::string_view chart_style();

// At most `buckets` points: y the mean of each bucket of neighbours, low and high its extremes. A series that
// is short enough comes back as it is. Values that are not finite are left out; a bucket of nothing else is
// NaN.
Series downsampled(const Series& series, std::size_t buckets);

// The average of each value and its neighbours on both sides, one at distance d with the weight smoothing^d:
// a curve that neither lags behind nor leans at its ends. Values that are not finite stay and count for
// nothing.
std::vector<double> smoothed(const std::vector<double>& values, double smoothing);

}  // namespace megalodon::report
