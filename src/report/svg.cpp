#include "report/svg.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace megalodon::report {
namespace {

// The length of the valid UTF-8 sequence at the start of `text`; 0 where there is none.
std::size_t sequence_length(std::string_view text) {
  const auto byte = [&](std::size_t at) { return std::uint32_t{static_cast<unsigned char>(text[at])}; };
  const std::uint32_t first = byte(0);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < length) return 0;
  std::uint32_t code = first & (0xffu >> (length + 1));
  for (std::size_t at = 1; at < length; ++at) {
    if ((byte(at) & 0xc0u) != 0x80u) return 0;
    code = code * 64 + byte(at) % 64;
  }
  const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  const bool surrogate = code >= 0xd800 && code <= 0xdfff;
  const bool not_a_character = code == 0xfffe || code == 0xffff || code > 0x10ffff;
  return overlong || surrogate || not_a_character ? 0 : length;
}

std::string_view anchor_name(Anchor anchor) {
  return anchor == Anchor::start ? "start" : anchor == Anchor::middle ? "middle" : "end";
}

}  // namespace

std::string escaped(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const std::size_t length = sequence_length(text);
    const char first = text[0];
    if (first == '&') {
      out += "&amp;";
    } else if (first == '<') {
      out += "&lt;";
    } else if (first == '>') {
      out += "&gt;";
    } else if (first == '"') {
      out += "&quot;";
    } else if (first == '\'') {
      out += "&#39;";
    } else if (length == 0 ||
               (length == 1 && (first == 0x7f || (first < ' ' && first != '\n' && first != '\t')))) {
      out += "\xef\xbf\xbd";  // U+FFFD
    } else {
      out.append(text.substr(0, length));
    }
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return out;
}

std::string coordinate(double value) {
  std::array<char, 32> text{};
  const double tenths = std::round(value * 10);
  const bool whole = std::fmod(tenths, 10) == 0;
  std::snprintf(text.data(), text.size(), whole ? "%.0f" : "%.1f", tenths == 0 ? 0.0 : tenths / 10);
  return text.data();
}

double text_width(std::string_view text) {
  double width = 0;
  for (const char letter : text) {
    if ((static_cast<unsigned char>(letter) & 0xc0u) == 0x80u) continue;  // the rest of a UTF-8 sequence
    const bool narrow = std::string_view(".,:;'|!()ilj ft").find(letter) != std::string_view::npos;
    const bool wide = std::string_view("mwMW").find(letter) != std::string_view::npos;
    width += narrow ? 5 : wide ? 13.5 : 8.8;
  }
  return width;
}

Svg::Svg(double width, double height, std::string_view title) {
  const std::string label = escaped(title);
  out_ = "<svg class=\"chart\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + coordinate(width) +
         " " + coordinate(height) + "\" role=\"img\" aria-label=\"" + label + "\">\n";
}

void Svg::text(double x, double y, std::string_view content, Anchor anchor, std::string_view classes,
               std::string_view attributes) {
  out_.append("<text x=\"").append(coordinate(x)).append("\" y=\"").append(coordinate(y));
  out_.append("\" text-anchor=\"").append(anchor_name(anchor)).append("\" class=\"").append(classes);
  out_.append("\"");
  if (!attributes.empty()) out_.append(" ").append(attributes);
  out_.append(">").append(escaped(content)).append("</text>\n");
}

void Svg::line(double x1, double y1, double x2, double y2, std::string_view classes) {
  out_.append("<line x1=\"").append(coordinate(x1)).append("\" y1=\"").append(coordinate(y1));
  out_.append("\" x2=\"").append(coordinate(x2)).append("\" y2=\"").append(coordinate(y2));
  out_.append("\" class=\"").append(classes).append("\"/>\n");
}

void Svg::rect(double x, double y, double width, double height, std::string_view classes,
               std::string_view hover, std::string_view attributes) {
  out_.append("<rect x=\"").append(coordinate(x)).append("\" y=\"").append(coordinate(y));
  out_.append("\" width=\"").append(coordinate(width)).append("\" height=\"").append(coordinate(height));
  out_.append("\" class=\"").append(classes).append("\"");
  if (!attributes.empty()) out_.append(" ").append(attributes);
  if (hover.empty()) {
    out_.append("/>\n");
  } else {
    out_.append("><title>").append(escaped(hover)).append("</title></rect>\n");
  }
}

void Svg::path(std::string_view data, std::string_view classes) {
  if (data.empty()) return;
  out_.append("<path d=\"").append(data).append("\" class=\"").append(classes).append("\"/>\n");
}

std::string Svg::finish() {
  return std::move(out_) + "</svg>\n";
}

}  // namespace megalodon::report
