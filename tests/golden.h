#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <string>

#include "model/tensor_file.h"
#include "ops/testing.h"

// Golden files: what the authors' code computed. Every file of $MEGALODON_GOLDEN_DIR/megalodon is checked by
// what it holds.
namespace megalodon::golden {

// A tensor of a file, where the tests run.
inline at::Tensor read_tensor(const SafetensorsFile& file, const std::string& name) {
  return model::read_tensor(file, name).to(ops::testing::device());
}

// Largest errors of a file by what they are of, with their bounds.
class Errors {
 public:
  // ||got - want|| / ||want|| in float64.
  void compare(const std::string& what, const at::Tensor& got, const at::Tensor& want, double bound) {
    const auto a = got.detach().to(at::kDouble), b = want.to(at::kDouble).view(a.sizes());
    const double norm = at::linalg_vector_norm(b).item<double>();
    const double error = at::linalg_vector_norm(a - b).item<double>();
    record(what, norm > 0 ? error / norm : error, bound);
  }
  void compare_absolute(const std::string& what, const at::Tensor& got, const at::Tensor& want,
                        double bound) {
    const auto a = got.detach().to(at::kDouble), b = want.to(at::kDouble).view(a.sizes());
    record(what, (a - b).abs().max().item<double>(), bound);
  }
  void require_equal(const std::string& what, const at::Tensor& got, const at::Tensor& want) {
    record(what, at::equal(got, want.to(got.scalar_type())) ? 0 : 1, 0);
  }

  bool passed() const {
    return !largest_.empty() && std::all_of(largest_.begin(), largest_.end(), [](const auto& entry) {
      return entry.second.error <= entry.second.bound;  // false for NaN
    });
  }
  std::string line() const {
    std::string text;
    for (const auto& [what, entry] : largest_) {
      char part[96];
      std::snprintf(part, sizeof part, "  %s %.1e (<= %.0e)%s", what.c_str(), entry.error, entry.bound,
                    entry.error <= entry.bound ? "" : " FAILED");
      text += part;
    }
    return text;
  }

 private:
  struct Entry {
    double error, bound;
  };
  void record(const std::string& what, double error, double bound) {
    auto& entry = largest_.try_emplace(what, Entry{error, bound}).first->second;
    if (!(error / std::max(bound, 1e-300) <= entry.error / std::max(entry.bound, 1e-300)))
      entry = {error, bound};
  }
  std::map<std::string, Entry> largest_;
};

Errors check_model(const SafetensorsFile& file);

}  // namespace megalodon::golden
