// write_events FOLDER FIRST LAST SCALE [--resume]: scalars "loss" (SCALE / step) and "rate" (step) of the
// steps FIRST .. LAST and a text, as a training run writes them; with --resume, readers are told to discard
// what was said before about FIRST and beyond. read_events.py checks what TensorBoard makes of it.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>

#include "report/tensorboard.h"

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  const long first = std::atol(argv[2]), last = std::atol(argv[3]);
  try {
    megalodon::report::EventWriter writer(argv[1]);
    if (argc > 5 && std::string_view(argv[5]) == "--resume") {
      writer.discard_from(first);
    } else {
      writer.add_text("config", "seed = 7  # **naïve**", 0);
    }
    for (long step = first; step <= last; ++step) {
      writer.add_scalar("loss", std::atof(argv[4]) / static_cast<double>(step), step, 1000.0 + step);
      writer.add_scalar("rate", static_cast<double>(step), step, 1000.0 + step);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
