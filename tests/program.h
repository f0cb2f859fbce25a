#pragma once
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/testing.h"

// Runs the real program on real files.
namespace megalodon::testing {

struct Outcome {
  int exit_code;  // 128 + signal where a signal ended it
  std::string out, err;
};

// A started program; its output goes to files in `folder`.
class Program {
 public:
  Program(const TemporaryFolder& folder, std::vector<std::string> arguments, const std::string& input = "")
      : out_(folder / "program.out"), err_(folder / "program.err") {
    const auto in = folder / "program.in";
    write_text(in, input);
    arguments.insert(arguments.begin(), MEGALODON_PROGRAM);
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, in.c_str(), O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    posix_spawn_file_actions_addopen(&files, 2, err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (posix_spawn(&pid_, argv[0], &files, nullptr, argv.data(), environ) != 0)
      throw std::runtime_error("cannot start");
    posix_spawn_file_actions_destroy(&files);
  }
  void signal(int number) const { kill(pid_, number); }
  bool running() {
    if (!ended_) ended_ = waitpid(pid_, &status_, WNOHANG) == pid_;
    return !ended_;
  }
  Outcome wait() {
    if (!ended_) waitpid(pid_, &status_, 0);
    ended_ = true;
    return {WIFSIGNALED(status_) ? 128 + WTERMSIG(status_) : WEXITSTATUS(status_), read_file(out_),
            read_file(err_)};
  }

 private:
  std::filesystem::path out_, err_;
  pid_t pid_ = 0;
  int status_ = 0;
  bool ended_ = false;
};

inline Outcome run(const TemporaryFolder& folder, std::vector<std::string> arguments,
                   const std::string& input = "") {
  return Program(folder, std::move(arguments), input).wait();
}

// The program refuses in one line on stderr that holds every one of `parts`, with this exit code and no
// output.
inline void expect_refusal(const TemporaryFolder& folder, const std::vector<std::string>& arguments,
                           int exit_code, const std::vector<std::string>& parts) {
  const auto outcome = run(folder, arguments);
  SCOPED_TRACE(outcome.err);
  EXPECT_EQ(outcome.exit_code, exit_code);
  EXPECT_TRUE(outcome.out.empty()) << outcome.out;
  EXPECT_TRUE(outcome.err.starts_with("error: "));
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1);
  for (const auto& part : parts) EXPECT_TRUE(contains(outcome.err, part));
}

// A text that compresses: words of a small vocabulary, the same in every run.
inline std::string sample_text(std::size_t words) {
  static const char* const vocabulary[] = {"the", "shark", "reads", "a",     "long", "sea",
                                           "of",  "text",  "and",   "swims", "on"};
  std::string text;
  uint64_t state = 12345;
  for (std::size_t i = 0; i < words; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    text += vocabulary[(state >> 33) % std::size(vocabulary)];
    text += (state >> 40) % 12 == 0 ? ".\n" : " ";
  }
  return text;
}

// A run that takes a second: a model of a few thousand parameters on `sample_text` in FOLDER/text.
inline std::string small_config(const TemporaryFolder& folder, const std::string& extra = "",
                                const std::string& type = "megalodon") {
  std::filesystem::create_directories(folder / "text");
  for (int i = 0; i < 8; ++i)
    write_text(folder / ("text/" + std::to_string(i) + ".txt"),
               sample_text(300 + static_cast<std::size_t>(i)));
  std::string model =
      type == "megalodon"
          ? "num_layers = 2\nmodel_dim = 32\nnum_heads = 2\nz_dim = 16\nvalue_dim = 32\n"
            "ffn_hidden_dim = 48\ncema_ndim = 4\nchunk_size = 16\nnorm_num_groups = 4\ndropout = 0.1\n"
          : "type = \"llama\"\nnum_hidden_layers = 2\nhidden_size = 32\nintermediate_size = 48\n"
            "num_attention_heads = 4\nnum_key_value_heads = 2\ndropout = 0.1\n";
  const auto path = folder / "config.toml";
  write_text(
      path,
      "run = \"" + (folder / "run").string() + "\"\nseed = 3\n[data]\ntrain = [\"" +
          (folder / "text").string() + "\"]\nvalidation_share = 0.2\n[model]\n" + model +
          "[train]\nsteps = 12\nbatch = 4\nmicro_batch = 2\ncontext = 40\n[schedule]\nlearning_rate = 5e-3\n"
          "[validation]\nevery = 4\nwindows = 2\n[checkpoint]\nevery = 3\n" +
          extra);
  return path.string();
}

}  // namespace megalodon::testing
