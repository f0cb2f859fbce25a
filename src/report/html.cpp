#include "report/html.h"

#include <algorithm>

#include "base/file.h"
#include "report/plot.h"
#include "report/svg.h"

namespace megalodon::report {
namespace {

constexpr std::string_view kStyle = R"css(
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.9em; line-height: 1.2; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.25em; margin: 44px 0 12px; }
.lead { font-size: 1.15em; max-width: 46em; margin: 0 0 24px; }
p { max-width: 46em; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px; margin: 20px 0; }
.figures div { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.figures b { display: block; font-size: 1.35em; line-height: 1.3; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: 0.9em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 24px; margin-bottom: 24px; }
.charts figure { margin: 0; max-width: 560px; background: var(--card); border-radius: 8px; padding: 16px; }
.scroll { overflow-x: auto; margin: 20px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 18px 7px 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 0.9em; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
pre { background: var(--card); border-radius: 8px; padding: 14px 16px; overflow-x: auto; font-size: 0.86em;
  line-height: 1.5; font-family: ui-monospace, "SF Mono", Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace; }
@media (max-width: 560px) { main { padding: 24px 16px 48px; } .charts figure { padding: 10px; }
  h1 { font-size: 1.55em; } .figures { grid-template-columns: 1fr 1fr; } th, td { padding-right: 14px; } }
)css";

bool is_number(std::string_view cell) {
  return cell == "–" || cell.starts_with("−") ||
         (!cell.empty() && std::string_view("0123456789+-").find(cell[0]) != std::string_view::npos);
}

std::string element(std::string_view name, std::string_view text, std::string_view classes = {}) {
  std::string out = "<" + std::string(name);
  if (!classes.empty()) out.append(" class=\"").append(classes).append("\"");
  return out + ">" + escaped(text) + "</" + std::string(name) + ">";
}

}  // namespace

Page::Page(std::string_view title, std::string_view lead) : title_(escaped(title)) {
  body_ = element("h1", title) + "\n" + element("p", lead, "lead") + "\n";
}

void Page::section(std::string_view heading) {
  body_ += element("h2", heading) + "\n";
}

void Page::paragraph(std::string_view text) {
  body_ += element("p", text) + "\n";
}

void Page::key_figures(const std::vector<KeyFigure>& figures) {
  body_ += "<div class=\"figures\">\n";
  for (const KeyFigure& figure : figures) {
    body_ += "<div>" + element("b", figure.value) + element("span", figure.label) + "</div>\n";
  }
  body_ += "</div>\n";
}

void Page::charts(const std::vector<std::string>& svgs) {
  body_ += "<div class=\"charts\">\n";
  for (const std::string& svg : svgs) body_ += "<figure>" + svg + "</figure>\n";
  body_ += "</div>\n";
}

void Page::table(const Table& table) {
  std::vector<std::string_view> classes;
  for (std::size_t column = 0; column < table.columns.size(); ++column) {
    const bool numbers = std::all_of(table.rows.begin(), table.rows.end(),
                                     [&](const auto& row) { return is_number(row[column]); });
    classes.push_back(numbers ? "number" : "");
  }
  const auto add_row = [&](std::string_view cell, const std::vector<std::string>& cells) {
    body_ += "<tr>";
    for (std::size_t column = 0; column < cells.size(); ++column) {
      body_ += element(cell, cells[column], classes[column]);
    }
    body_ += "</tr>\n";
  };
  body_ += "<div class=\"scroll\"><table>\n";
  if (std::any_of(table.columns.begin(), table.columns.end(),
                  [](const auto& name) { return !name.empty(); })) {
    body_ += "<thead>";
    add_row("th", table.columns);
    body_ += "</thead>\n";
  }
  body_ += "<tbody>\n";
  for (const auto& row : table.rows) add_row("td", row);
  body_ += "</tbody></table></div>\n";
}

void Page::preformatted(std::string_view text) {
  body_ += element("pre", text) + "\n";
}

std::string Page::html() const {
  std::string out =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<meta name=\"color-scheme\" content=\"light dark\"/>\n<title>";
  out.append(title_).append("</title>\n<style>").append(chart_style()).append(kStyle);
  out.append("</style>\n</head>\n<body>\n<main>\n").append(body_).append("</main>\n</body>\n</html>\n");
  return out;
}

void Page::write(const std::filesystem::path& path) const {
  write_file_atomically(path, html());
}

}  // namespace megalodon::report
