#include "ops_bench.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>
#include <malloc.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <map>

namespace megalodon::bench {
namespace {

// The process's memory in MiB: VmRSS now, or VmHWM, its peak.
double process_memory(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key + ":")) return std::stod(line.substr(key.size() + 1)) / 1024;
  }
  return 0;
}

// What `work` takes at its peak beyond what is there before it: results and gradients included.
double peak_extra_memory(const std::function<void()>& work) {
  malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << "5";  // starts the peak anew
  const double before = process_memory("VmRSS");
  work();
  return process_memory("VmHWM") - before;
}

void run(benchmark::State& state, const Contestant& contestant) {
  const auto work = contestant.prepare();
  work();
  for (auto _ : state) work();
  state.counters["extra_MiB"] = peak_extra_memory(work);
}

std::string run_name(const Comparison& comparison, const Contestant& contestant) {
  return comparison.name + "/" + contestant.name;
}

// Google Benchmark's own lines, and then one line a peer with the ratios: of the best of several repetitions,
// since what else runs on a machine only ever adds time.
class RatioReporter : public benchmark::ConsoleReporter {
 public:
  explicit RatioReporter(const std::vector<Comparison>& comparisons) : comparisons_(comparisons) {}

  void ReportRuns(const std::vector<Run>& runs) override {
    ConsoleReporter::ReportRuns(runs);
    for (const auto& r : runs) {
      if (r.aggregate_name != "best") continue;
      results_[r.run_name.function_name] = {r.GetAdjustedRealTime(), r.counters.at("extra_MiB")};
    }
  }
  void Finalize() override {
    ConsoleReporter::Finalize();
    for (const auto& c : comparisons_) {
      for (std::size_t i = 1; i < c.contestants.size(); ++i) {
        const auto ours = results_.find(run_name(c, c.contestants[0]));
        const auto peer = results_.find(run_name(c, c.contestants[i]));
        if (ours == results_.end() || peer == results_.end()) continue;
        fmt::print("{}: {:.2f} ms, {} {:.2f} ms, {:.1f} times as fast; {:.1f} MiB against {:.1f} MiB\n",
                   c.name, ours->second.milliseconds, c.contestants[i].name, peer->second.milliseconds,
                   peer->second.milliseconds / ours->second.milliseconds, ours->second.extra_mib,
                   peer->second.extra_mib);
      }
    }
  }

 private:
  struct Result {
    double milliseconds, extra_mib;
  };
  const std::vector<Comparison>& comparisons_;
  std::map<std::string, Result> results_;
};

}  // namespace

std::function<void()> forward_backward(std::function<at::Tensor(const std::vector<at::Tensor>&)> f,
                                       const std::vector<at::Tensor>& inputs) {
  std::vector<at::Tensor> leaves;
  for (const auto& x : inputs) leaves.push_back(x.detach().clone().set_requires_grad(true));
  const auto upstream = at::ones_like(f(leaves));
  return [=] { benchmark::DoNotOptimize(torch::autograd::grad({f(leaves)}, leaves, {upstream})); };
}

int main(int argc, char** argv) {
  // Freed tensors stay with the process: no contestant pays page faults in every turn.
  mallopt(M_MMAP_THRESHOLD, std::numeric_limits<int>::max());
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  std::vector<Comparison> comparisons;
  for (const auto& of_operator : {attention_comparisons(), cema_comparisons(), norm_comparisons()})
    comparisons.insert(comparisons.end(), of_operator.begin(), of_operator.end());
  for (const auto& comparison : comparisons) {
    for (const auto& contestant : comparison.contestants) {
      benchmark::RegisterBenchmark(run_name(comparison, contestant).c_str(), run, contestant)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime()
          ->MinTime(0.2)
          ->Repetitions(4)
          ->ReportAggregatesOnly()
          ->ComputeStatistics("best", [](const auto& v) { return *std::min_element(v.begin(), v.end()); });
    }
  }
  RatioReporter reporter(comparisons);
  benchmark::RunSpecifiedBenchmarks(&reporter);
  return 0;
}

}  // namespace megalodon::bench

int main(int argc, char** argv) {
  return megalodon::bench::main(argc, argv);
}
