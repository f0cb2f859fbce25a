#pragma once
#include <CLI/CLI.hpp>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/tokenizer.h"
#include "model/language_model.h"

namespace megalodon::cli {

// A command adds itself to the program: its options, and what runs when it is chosen. Returns are exit codes.
using Run = std::function<int()>;
void add_train(CLI::App& program, Run& chosen);
void add_generate(CLI::App& program, Run& chosen);
void add_eval(CLI::App& program, Run& chosen);
void add_info(CLI::App& program, Run& chosen);
void add_data(CLI::App& program, Run& chosen);
void add_task(CLI::App& program, Run& chosen);
void add_improve(CLI::App& program, Run& chosen);
void add_report(CLI::App& program, Run& chosen);
void add_bench(CLI::App& program, Run& chosen);

// `--device cpu|cuda|auto`, for ops::open_device.
void add_device(CLI::App& command, std::string& device);

// A model directory, or the newest checkpoint of a run directory (its first model where there are several).
std::filesystem::path model_folder(const std::string& path);

// A request error where the tokenizer has ids that the model does not know.
void check_fits(const data::Tokenizer& tokenizer, const model::LanguageModel& model,
                const std::string& where);

// Prints one JSON object on a line of stdout at once, so that a reader of a pipe sees it.
void print_json(const Json& object);

}  // namespace megalodon::cli
