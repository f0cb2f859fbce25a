#include "fuzz.h"
#include "report/improve_report.h"
#include "report/run_report.h"
#include "report/testing.h"

// Whatever a run or an evaluation wrote, the page made of it is well-formed and draws no number that is not
// finite.
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon;
  const std::string_view text = fuzz::text_of(data, size);
  const auto check = [](const std::string& html) {
    fuzz::require(report::testing::xml_fault(html).empty(), "pages are well-formed");
    // A quote in the input comes out escaped, so that these stand in attributes.
    for (const char* number : {"=\"nan", "=\"-nan", "=\"inf", "=\"-inf", "=\"Mnan", "=\"Minf"}) {
      fuzz::require(html.find(number) == html.npos, "coordinates are finite");
    }
  };
  report::ImproveRun improvement = report::parse_improve_metrics(text);
  report::parse_wrong_answers(text, improvement);
  check(report::improve_report_html(improvement, text));
  report::Results results;
  fuzz::takes([&] { report::parse_results(text, "input", results); });
  fuzz::takes([&] {
    const report::RunMetrics run = report::parse_metrics(text, "input");
    check(report::run_report_html(run, text));
    check(report::comparison_html("title", {std::string(text)}, {run}, results));
  });
  return 0;
}
