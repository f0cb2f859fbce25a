#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

// What the commands that write a run directory share.
namespace megalodon::cli {

// A request error where the folder cannot be made.
void make_run_folder(const std::filesystem::path& run);

// Refuses to mix two runs in one folder; writes the resolved configuration where it is new.
void settle_configuration(const std::filesystem::path& run, const std::string& resolved, bool resume,
                          const std::function<bool(std::string_view)>& may_change_on_resume);

// "2026-11-25 04:00:00 UTC"
std::string time_now();

}  // namespace megalodon::cli
