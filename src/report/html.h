#pragma once
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace megalodon::report {

struct KeyFigure {
  std::string value, label;
};

// Columns whose cells all are numbers, or "–" for none, are set to the right. Without
// any column name there is no heading.
struct Table {
  std::vector<std::string> columns;
  std::vector<std::vector<std::string>> rows;  // each as long as columns
};

// One HTML page in one file: style and charts inline, nothing fetched, light and dark. All text is escaped;
// charts are the SVG that draw() of report/plot.h returns.
class Page {
 public:
  // `lead` is one sentence: the result.
  Page(std::string_view title, std::string_view lead);

  void section(std::string_view heading);
  void paragraph(std::string_view text);
  void key_figures(const std::vector<KeyFigure>& figures);
  void charts(const std::vector<std::string>& svgs);  // two beside each other where there is room
  void table(const Table& table);
  void preformatted(std::string_view text);

  std::string html() const;
  void write(const std::filesystem::path& path) const;  // whole or not at all

 private:
  std::string title_, body_;
};

}  // namespace megalodon::report
