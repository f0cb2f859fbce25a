// write_events FOLDER FIRST LAST SCALE [--resume]: scalars "loss" (SCALE / step) and "rate" (step) of the
// steps FIRST .. LAST and a text, as a training run writes them; with --resume, readers are told to discard
// what was said before about FIRST and beyond. read_events.py checks what TensorBoard makes of it.
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "report/tensorboard.h"

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  try {
    const long first = std::stol(argv[2]), last = std::stol(argv[3]);
    const double scale = std::stod(argv[4]);
    megalodon::report::EventWriter writer(argv[1]);
    if (argc > 5 && std::string_view(argv[5]) == "--resume") {
      writer.discard_from(first);
    } else {
      writer.add_text("config", "seed = 7  # **naïve**", 0);
    }
    for (long step = first; step <= last; ++step) {
      writer.add_scalar("loss", scale / static_cast<double>(step), step, 1000.0 + step);
      writer.add_scalar("rate", static_cast<double>(step), step, 1000.0 + step);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
