#pragma once
#include <string>
#include <string_view>

namespace megalodon::report {

// Text for HTML and XML, in attributes too: markup characters escaped, control characters and invalid UTF-8
// replaced.
std::string escaped(std::string_view text);

enum class Anchor { start, middle, end };

// Builds one SVG picture, element by element, in a coordinate system of `width` x `height`.
class Svg {
 public:
  Svg(double width, double height, std::string_view title);

  void text(double x, double y, std::string_view content, Anchor anchor, std::string_view classes,
            std::string_view attributes = {});
  void line(double x1, double y1, double x2, double y2, std::string_view classes);
  // With `hover` not empty, shown when the pointer rests on it.
  void rect(double x, double y, double width, double height, std::string_view classes,
            std::string_view hover = {}, std::string_view attributes = {});
  void path(std::string_view data, std::string_view classes);
  void raw(std::string_view markup) { out_ += markup; }
  std::string finish();

 private:
  std::string out_;
};

// A coordinate: one decimal at most.
std::string coordinate(double value);

// About how wide `text` is in the largest size that the style sheet gives to the plain text of charts.
double text_width(std::string_view text);

}  // namespace megalodon::report
