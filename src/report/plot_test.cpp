#include "report/plot.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/random.h"
#include "report/html.h"
#include "report/svg.h"
#include "report/testing.h"

namespace megalodon::report {
namespace {

using testing::count_of;
using testing::xml_fault;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

Series series_of(std::vector<double> x, std::vector<double> y) {
  return {"a", std::move(x), std::move(y), {}, {}, 0};
}

std::vector<std::string> labels_of(const Axis& axis) {
  std::vector<std::string> labels;
  labels.reserve(axis.ticks.size());
  for (const Tick& tick : axis.ticks) labels.push_back(tick.label);
  return labels;
}

using Labels = std::vector<std::string>;

TEST(Axis, TicksAreRoundAndInRange) {
  EXPECT_EQ(labels_of(make_axis(std::vector{0.0, 10.0}, Scale::linear, 0, 5)),
            (Labels{"0", "2", "4", "6", "8", "10"}));
  EXPECT_EQ(labels_of(make_axis(std::vector{1.02, 1.05}, Scale::linear, 0, 3)),
            (Labels{"1.02", "1.03", "1.04", "1.05"}));
  EXPECT_EQ(labels_of(make_axis(std::vector{0.0, 3e6}, Scale::linear, 0, 3)),
            (Labels{"0", "1M", "2M", "3M"}));
  EXPECT_EQ(labels_of(make_axis(std::vector{-1.0, 1.0}, Scale::linear, 0, 2)), (Labels{"-1", "0", "1"}));
  EXPECT_EQ(labels_of(make_axis(std::vector{1.0, 1e4}, Scale::logarithmic, 0, 5)),
            (Labels{"1", "10", "100", "1000", "10k"}));
  EXPECT_EQ(labels_of(make_axis(std::vector{1.0, 20.0}, Scale::logarithmic, 0, 5)),
            (Labels{"1", "2", "5", "10", "20"}));
}

TEST(Axis, EveryRangeGetsTicksInOrderInsideIt) {
  Random random(7, Purpose::test, 0);
  for (int trial = 0; trial < 2000; ++trial) {
    const double size = std::pow(10.0, 40 * random.uniform() - 20);
    const double low = size * (2 * random.uniform() - 1);
    const double high = low + std::abs(low) * std::pow(10.0, 6 * random.uniform() - 4);
    for (const Scale scale : {Scale::linear, Scale::logarithmic}) {
      const Axis axis = make_axis(std::vector{low, high}, scale, 0.05, 5);
      ASSERT_LT(axis.low, axis.high);
      ASSERT_LE(axis.ticks.size(), 12u) << low << " " << high;
      ASSERT_GE(axis.ticks.size(), 1u) << low << " " << high;
      for (std::size_t i = 0; i < axis.ticks.size(); ++i) {
        ASSERT_GE(axis.place(axis.ticks[i].value), -1e-6) << low << " " << high;
        ASSERT_LE(axis.place(axis.ticks[i].value), 1 + 1e-6) << low << " " << high;
        if (i > 0) {
          ASSERT_LT(axis.ticks[i - 1].value, axis.ticks[i].value);
          ASSERT_NE(axis.ticks[i - 1].label, axis.ticks[i].label) << low << " " << high;
        }
      }
    }
  }
}

TEST(Axis, LeavesOutWhatItCannotShow) {
  const Axis axis = make_axis(std::vector{kNaN, -5.0, 0.0, 1.0, 100.0, kInfinity}, Scale::logarithmic, 0, 5);
  EXPECT_DOUBLE_EQ(axis.low, 1);
  EXPECT_DOUBLE_EQ(axis.high, 100);
  EXPECT_DOUBLE_EQ(axis.place(10), 0.5);
  EXPECT_TRUE(std::isnan(axis.place(0)));
  EXPECT_TRUE(std::isnan(axis.place(kInfinity)));
  const Axis huge = make_axis(std::vector{-1e308, 0.0, 1.0, 1e308}, Scale::linear, 0.05, 5);
  EXPECT_LT(huge.high, 2);
  const Axis empty = make_axis({}, Scale::linear, 0.05, 5);
  EXPECT_LT(empty.low, empty.high);
}

TEST(Numbers, AreWrittenForPeople) {
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(-1234567), "-1,234,567");
  EXPECT_EQ(grouped(-123), "-123");
  EXPECT_EQ(rounded(1.23456, 4), "1.235");
  EXPECT_EQ(rounded(123456.7, 4), "123,457");
  EXPECT_EQ(rounded(0.00012345, 3), "0.000123");
  EXPECT_EQ(rounded(1.5e-7, 2), "1.5e-07");
  EXPECT_EQ(rounded(kNaN, 4), "–");
  EXPECT_EQ(short_number(12400, 3), "12.4k");
  EXPECT_EQ(short_number(1500, 3), "1500");
  EXPECT_EQ(short_number(0.25, 4), "0.25");
  EXPECT_EQ(short_number(-3e6, 3), "-3M");
}

TEST(Escaped, LeavesNoMarkupAndNoInvalidText) {
  EXPECT_EQ(escaped("<a href=\"x\">&'</a>"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;&lt;/a&gt;");
  EXPECT_EQ(escaped("naïve 漢 😀"), "naïve 漢 😀");
  const std::string replaced = "\xef\xbf\xbd";
  EXPECT_EQ(escaped(std::string_view("a\0b\x1b", 4)), "a" + replaced + "b" + replaced);
  EXPECT_EQ(escaped("\xff"), replaced);
  EXPECT_EQ(escaped("\xc3"), replaced);                                // cut off
  EXPECT_EQ(escaped("\xc0\xaf"), replaced + replaced);                 // overlong
  EXPECT_EQ(escaped("\xed\xa0\x80"), replaced + replaced + replaced);  // a surrogate
  EXPECT_EQ(escaped("\xf4\x90\x80\x80"),
            replaced + replaced + replaced + replaced);  // beyond the last character
}

TEST(XmlFault, FindsWhatIsWrong) {
  EXPECT_EQ(xml_fault("<!DOCTYPE x><a b=\"1\" c=\"&lt;\"><d/>text &amp; more</a>"), "");
  for (const char* text : {"<a>", "</a>", "<a></b>", "<a b=1/>", "<a b=\"1/>", "<a b=\"1\" b=\"2\"/>",
                           "<a b=\"&\"/>", "&nbsp;", "a\x01", "<a"}) {
    EXPECT_NE(xml_fault(text), "") << text;
  }
}

TEST(LineChart, IsWellFormedForEverySeries) {
  std::vector<std::vector<Series>> cases = {{},
                                            {series_of({}, {})},
                                            {series_of({1}, {2})},
                                            {series_of({1, 2, 3}, {kNaN, kInfinity, -kInfinity})},
                                            {series_of({1, 2, 3, 4}, {1, kNaN, -1, 0})},
                                            {series_of({0, 0}, {5, 5})},
                                            {series_of({1, 2}, {-1e308, 1e308}), series_of({kNaN}, {1})}};
  for (std::size_t i = 0; i < cases.size(); ++i) {
    for (const Scale scale : {Scale::linear, Scale::logarithmic}) {
      for (const double smoothing : {0.0, 0.9}) {
        LineChart chart{"<t> & \"u\"", "x<", "y>", scale, scale, smoothing > 0, {}, cases[i]};
        for (Series& series : chart.series) series.smoothing = smoothing;
        const std::string svg = draw(chart);
        EXPECT_EQ(xml_fault(svg), "") << "case " << i << "\n" << svg;
        EXPECT_EQ(svg.find("nan"), svg.npos) << "case " << i << "\n" << svg;
        EXPECT_EQ(svg.find("inf"), svg.npos) << "case " << i << "\n" << svg;
      }
    }
  }
}

TEST(LineChart, SaysWhereThereIsNoData) {
  EXPECT_EQ(count_of(draw(LineChart{"t", "x", "y", {}, {}, false, {}, {}}), ">no data<"), 1u);
  LineChart chart{"t", "x", "y", {}, Scale::logarithmic, false, {}, {series_of({1, 2}, {-1, 0})}};
  EXPECT_EQ(count_of(draw(chart), ">no data<"), 1u);
}

TEST(LineChart, BreaksTheLineAtAGap) {
  const LineChart chart{"t", "x", "y", {}, {}, false, {}, {series_of({0, 1, 2, 3, 4}, {0, 1, kNaN, 1, 0})}};
  const std::string svg = draw(chart);
  const std::size_t end = svg.find("\" class=\"line s0\"");
  ASSERT_NE(end, svg.npos);
  const std::size_t begin = svg.rfind("d=\"", end);
  EXPECT_EQ(count_of(svg.substr(begin, end - begin), "M"), 2u);
  EXPECT_EQ(count_of(svg.substr(begin, end - begin), "L"), 2u);
  EXPECT_EQ(count_of(svg, "class=\"marker s0\""), 4u);
  EXPECT_EQ(count_of(svg, "<title>"), 5u);
}

TEST(LineChart, KeepsEndLabelsApart) {
  LineChart chart{"t", "x", "y", {}, {}, false, {}, {}};
  for (int i = 0; i < 6; ++i) chart.series.push_back(series_of({0, 1}, {2, 1 + i * 1e-3}));
  const std::string svg = draw(chart);
  std::vector<double> places;
  for (std::size_t at = svg.find("class=\"end"); at != svg.npos; at = svg.find("class=\"end", at + 1)) {
    places.push_back(std::stod(svg.substr(svg.rfind("y=\"", at) + 3)));
  }
  ASSERT_EQ(places.size(), 6u);
  std::sort(places.begin(), places.end());
  for (std::size_t i = 1; i < places.size(); ++i) EXPECT_GE(places[i] - places[i - 1], 14);
}

TEST(Downsampled, KeepsMeanAndExtremes) {
  Series series{"a", {}, {}, {}, {}, 0.5};
  for (int i = 0; i < 100'000; ++i) {
    series.x.push_back(i);
    series.y.push_back(i == 50'050 ? 1000 : i == 70'000 ? kNaN : i % 2);
  }
  const Series out = downsampled(series, 1000);
  ASSERT_EQ(out.x.size(), 1000u);
  EXPECT_DOUBLE_EQ(out.x[0], 49.5);
  EXPECT_DOUBLE_EQ(out.y[0], 0.5);
  EXPECT_DOUBLE_EQ(out.low[0], 0);
  EXPECT_DOUBLE_EQ(out.high[0], 1);
  EXPECT_DOUBLE_EQ(out.high[500], 1000);
  EXPECT_TRUE(std::isfinite(out.y[700]));
  EXPECT_DOUBLE_EQ(out.smoothing, 0.5);
  EXPECT_EQ(downsampled(out, 1000).y, out.y);
  const Series nothing = downsampled(series_of({1, 2, 3}, {kNaN, kNaN, kNaN}), 1);
  EXPECT_TRUE(std::isnan(nothing.y[0]));
}

TEST(Smoothed, WeighsNeighboursByDistanceAndKeepsGaps) {
  const std::vector<double> out = smoothed({3, 3, kNaN, 3}, 0.9);
  EXPECT_NEAR(out[0], 3, 1e-12);
  EXPECT_NEAR(out[3], 3, 1e-12);
  EXPECT_TRUE(std::isnan(out[2]));
  EXPECT_NEAR(smoothed({0, 1}, 0.5)[1], 2.0 / 3, 1e-12);
  EXPECT_NEAR(smoothed({0, 0, 1, 0, 0}, 0.5)[1], 0.5 / 2.375, 1e-12);
  const std::vector<double> slope = smoothed({0, 1, 2, 3, 4, 5, 6}, 0.5);
  EXPECT_NEAR(slope[3], 3, 1e-12);  // no lag
}

TEST(HeatMap, ShowsEveryCell) {
  const HeatMap map{"Accuracy <%>",
                    "round",
                    "digits",
                    {"1", "2", "3"},
                    {"5", "10"},
                    {{1, 0.5, kNaN}, {0, kInfinity, 2}},
                    0,
                    1};
  const std::string svg = draw(map);
  EXPECT_EQ(xml_fault(svg), "");
  EXPECT_EQ(count_of(svg, "<title>"), 6u);
  EXPECT_EQ(count_of(svg, "class=\"nothing\""), 2u);
  EXPECT_EQ(count_of(svg, "digits 10, round 1: 0<"), 1u);
  EXPECT_EQ(svg.find("nan"), svg.npos);
  EXPECT_EQ(xml_fault(draw(HeatMap{"empty", "x", "y", {}, {}, {}, 0, 0})), "");
}

TEST(HeatMap, NamesSomeOfManyRows) {
  HeatMap map{"Accuracy", "round", "digits", {"0"}, {}, {}, 0, 1};
  for (int row = 100; row > 0; --row) {
    map.rows.push_back(std::to_string(row));
    map.values.push_back({1});
  }
  const std::string svg = draw(map);
  EXPECT_EQ(count_of(svg, "class=\"cell\" "), 100u + 24u) << "and the scale";
  const std::size_t names = count_of(svg, "text-anchor=\"end\" class=\"tick\"");
  EXPECT_GT(names, 30u);
  EXPECT_LT(names, 50u);
}

TEST(BarChart, DrawsBarsInProportion) {
  const BarChart chart{"Speed", "tokens a second", {{"a & b", 100}, {"c", 50}, {"d", kNaN}, {"e", -3}}};
  const std::string svg = draw(chart);
  EXPECT_EQ(xml_fault(svg), "");
  EXPECT_EQ(count_of(svg, "class=\"bar s0\""), 4u);
  EXPECT_EQ(svg.find("width=\"-"), svg.npos);
  EXPECT_EQ(svg.find("nan"), svg.npos);
  EXPECT_EQ(xml_fault(draw(BarChart{"empty", "", {}})), "");
}

TEST(Page, IsOneWellFormedFileWithoutNetwork) {
  Page page("A <title>", "It works & \"well\".");
  page.section("<section>");
  page.paragraph("</p><script>alert(1)</script>");
  page.key_figures({{"1.5", "loss <"}});
  page.table({{"name", "value"}, {{"a", "1,000"}, {"b", "–"}}});
  page.charts({draw(BarChart{"t", "", {{"a", 1}}})});
  page.preformatted("[model]\nname = \"<x>\"");
  const std::string html = page.html();
  EXPECT_EQ(xml_fault(html), "");
  EXPECT_EQ(html.find("<script"), html.npos);
  EXPECT_EQ(count_of(html, "http"), 1u);  // the name of the SVG namespace
  EXPECT_EQ(count_of(html, "src="), 0u);
  EXPECT_EQ(count_of(html, "href="), 0u);
  EXPECT_EQ(count_of(html, "url("), 0u);
  EXPECT_EQ(count_of(html, "<td>a</td><td class=\"number\">1,000</td>"), 1u);
  EXPECT_EQ(count_of(html, "<td>b</td><td class=\"number\">–</td>"), 1u);
}

}  // namespace
}  // namespace megalodon::report
