#include <c10/util/Exception.h>
#include <malloc.h>

#include <cstdio>
#include <exception>
#include <limits>

#include "base/error.h"
#include "base/signals.h"
#include "cli/command.h"

namespace {

int fail(std::string message, megalodon::Error::Kind kind) {
  message = message.substr(0, message.find('\n'));
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return static_cast<int>(kind);
}

int run(int argc, char** argv) {
  using megalodon::Error;
  CLI::App program("Megalodon: language models that read without a length limit.", "megalodon");
  program.set_version_flag("--version", MEGALODON_VERSION);
  program.require_subcommand(1);
  megalodon::cli::Run chosen;
  megalodon::cli::add_train(program, chosen);
  megalodon::cli::add_improve(program, chosen);
  megalodon::cli::add_generate(program, chosen);
  megalodon::cli::add_eval(program, chosen);
  megalodon::cli::add_info(program, chosen);
  megalodon::cli::add_data(program, chosen);
  megalodon::cli::add_task(program, chosen);
  megalodon::cli::add_report(program, chosen);
  megalodon::cli::add_bench(program, chosen);
  try {
    program.parse(argc, argv);
    return chosen();
  } catch (const CLI::Success& done) {  // --help, --version
    return program.exit(done);
  } catch (const CLI::ParseError& error) {
    return fail(std::string(error.what()) + ": see megalodon --help", Error::Kind::request);
  } catch (const Error& error) {
    return fail(error.what(), error.kind());
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), Error::Kind::work);
  } catch (const std::bad_alloc&) {
    return fail("out of memory: use a smaller model, batch or context", Error::Kind::work);
  } catch (const std::exception& error) {
    return fail(error.what(), Error::Kind::work);
  }
}

}  // namespace

int main(int argc, char** argv) {
  // Freed tensors stay with the process: by default glibc maps each large one anew and touches its pages
  // again (docs/log.md).
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
  return run(argc, argv);
}
