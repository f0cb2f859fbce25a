#include "generate/greedy.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/parallel.h"
#include "ops/cross_entropy/cross_entropy.h"
#include "ops/product.h"

namespace megalodon::generate {
namespace {

// The likeliest token of each row, the first of equals, and its log-probability.
struct Picks {
  at::Tensor tokens;           // [R] int64
  at::Tensor log_probability;  // [R] float32

  Picks cpu() const { return {tokens.cpu(), log_probability.cpu()}; }
};

at::Tensor likeliest(const at::Tensor& values) {
  if (!values.is_cpu()) return values.argmax(1);
  const int64_t R = values.size(0), V = values.size(1);
  auto tokens = at::empty({R}, at::kLong);
  const float* const from = values.const_data_ptr<float>();
  auto* const to = tokens.mutable_data_ptr<int64_t>();
  parallel_for(R, std::max<int64_t>(1, (int64_t{1} << 14) / V), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      to[r] = std::max_element(from + r * V, from + (r + 1) * V) - (from + r * V);
  });
  return tokens;
}

Picks pick(const at::Tensor& logits) {  // [R, V]
  const auto values = logits.contiguous(), tokens = likeliest(values);
  return {tokens, -ops::cross_entropy(values, tokens)};
}

// Problems whose prompts are equally long, on their way. Row k W + j of the model's batch is model k's answer
// to the j-th of the W problems that are still in it.
class Batch {
 public:
  using Prompts = std::span<const std::vector<std::int32_t>>;
  using Answers = std::vector<std::vector<Answer>>;

  // `whole` reads for the batch as long as it keeps its width.
  Batch(const model::LanguageModel& model, Stepper& whole, Prompts prompts, std::vector<std::size_t> problems,
        const GreedyOptions& options, Answers& answers)
      : model_(model),
        options_(options),
        problems_(std::move(problems)),
        answers_(answers),
        prompts_(at::empty({rows(), static_cast<int64_t>(prompts[problems_[0]].size())}, at::kLong)),
        state_(whole.fresh_state(rows(), capacity(model.device(), prompts_.size(1) + options.bound))),
        of_less_(model),
        stepper_(&whole) {
    auto* to = prompts_.mutable_data_ptr<int64_t>();
    for (int64_t row = 0; row < rows(); ++row) {
      const auto& prompt = prompts[problem(row)];
      to = std::copy(prompt.begin(), prompt.end(), to);
    }
    running_.assign(static_cast<std::size_t>(rows()), true);
  }

  // On a CUDA device some steps are under way before the first is looked at.
  void run() {
    const int64_t ahead = model_.device().is_cuda() ? 8 : 1;
    auto picks = pick(model_.next_logits(prompts_.to(model_.device()), state_));
    take(picks.cpu());
    stepper_->take_over(state_);
    for (int64_t read = 1; read < options_.bound && shrink(picks.tokens);) {
      std::vector<Picks> some;
      for (const int64_t end = std::min(read + ahead, options_.bound); read < end; ++read) {
        picks = pick(stepper_->step(picks.tokens, state_));
        some.push_back(picks);
      }
      for (const auto& each : some) take(each.cpu());
    }
    for (int64_t row = 0; row < rows(); ++row) finish(row);
  }

 private:
  // On a CUDA device batches of like lengths have states of one shape, for which steps are recorded once.
  static int64_t capacity(at::Device device, int64_t positions) {
    return device.is_cuda() ? (positions + 63) / 64 * 64 : positions;
  }
  int64_t width() const { return static_cast<int64_t>(problems_.size()); }
  int64_t rows() const { return model_.stack() * width(); }
  std::size_t problem(int64_t row) const { return problems_[static_cast<std::size_t>(row % width())]; }
  Answer& answer(int64_t row) { return answers_[static_cast<std::size_t>(row / width())][problem(row)]; }

  // Until then mean_log_probability is the sum.
  void finish(int64_t row) {
    if (!running_[static_cast<std::size_t>(row)]) return;
    running_[static_cast<std::size_t>(row)] = false;
    auto& a = answer(row);
    const auto count = a.tokens.size() + (a.ended ? 1 : 0);
    if (count > 0) a.mean_log_probability /= static_cast<double>(count);
  }

  void take(const Picks& picks) {
    const auto* const token = picks.tokens.const_data_ptr<int64_t>();
    const auto* const log_probability = picks.log_probability.const_data_ptr<float>();
    if (!std::all_of(log_probability, log_probability + rows(), [](float x) { return std::isfinite(x); }))
      fail_work("the model's logits are not finite", "greedy answers", "its weights are damaged");
    for (int64_t row = 0; row < rows(); ++row) {
      if (!running_[static_cast<std::size_t>(row)]) continue;
      auto& a = answer(row);
      a.mean_log_probability += static_cast<double>(log_probability[row]);
      a.ended = token[row] == options_.end;
      if (a.ended) {
        finish(row);
      } else {
        a.tokens.push_back(static_cast<std::int32_t>(token[row]));
      }
    }
  }

  bool any_running(int64_t column) const {
    for (int64_t row = column; row < rows(); row += width())
      if (running_[static_cast<std::size_t>(row)]) return true;
    return false;
  }

  // Leaves finished problems and their rows of `next` [R] behind once they are a quarter of the batch: each
  // time the caches are copied.
  // The widths come from the first one alone (some finished problems may stay on as ballast), because matrix
  // libraries prepare a kernel for every shape they meet. False where nothing runs any more.
  bool shrink(at::Tensor& next) {
    std::vector<int64_t> order, finished;
    for (int64_t column = 0; column < width(); ++column)
      (any_running(column) ? order : finished).push_back(column);
    const auto running = static_cast<int64_t>(order.size());
    const auto narrower = [](int64_t w) { return (3 * w + 3) / 4; };
    int64_t kept = width();
    while (narrower(kept) < kept && running <= narrower(kept)) kept = narrower(kept);
    if (running == 0 || kept == width()) return running > 0;

    order.insert(order.end(), finished.begin(), finished.begin() + (kept - running));
    std::vector<int64_t> chosen;
    for (int64_t k = 0; k < model_.stack(); ++k)
      for (const auto column : order) chosen.push_back(k * width() + column);
    std::vector<std::size_t> problems;
    for (const auto column : order) problems.push_back(problems_[static_cast<std::size_t>(column)]);
    std::vector<bool> still_running;
    for (const auto row : chosen) still_running.push_back(running_[static_cast<std::size_t>(row)]);
    state_ = state_.select(chosen);
    stepper_ = &of_less_;
    next = next.index_select(0, at::tensor(chosen, at::kLong).to(next.device()));
    problems_ = std::move(problems);
    running_ = std::move(still_running);
    return true;
  }

  const model::LanguageModel& model_;
  const GreedyOptions& options_;
  std::vector<std::size_t> problems_;  // W
  Answers& answers_;
  at::Tensor prompts_;  // [R, L]
  model::StreamState state_;
  Stepper of_less_;
  Stepper* stepper_;
  std::vector<bool> running_;  // R: answers that have not ended
};

}  // namespace

std::vector<std::vector<Answer>> GreedyDecoder::answer(std::span<const std::vector<std::int32_t>> prompts,
                                                       const GreedyOptions& options) {
  const at::NoGradGuard no_grad;
  const ops::ConstantWeights constant_weights;
  std::vector<std::vector<Answer>> answers(static_cast<std::size_t>(model_.stack()),
                                           std::vector<Answer>(prompts.size()));
  std::vector<std::size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, {}, [&](std::size_t i) { return std::pair(prompts[i].size(), i); });
  const auto length = [&](std::size_t i) { return prompts[order[i]].size(); };
  if (!order.empty() && length(0) == 0) {
    fail_request("empty prompt", "prompt " + std::to_string(order[0]), "give at least one token");
  }
  const auto most = static_cast<std::size_t>(std::max<int64_t>(1, options.batch));
  for (std::size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    while (end < order.size() && end - begin < most && length(end) == length(begin)) ++end;
    const auto first = order.begin() + static_cast<std::ptrdiff_t>(begin);
    Batch(model_, stepper_, prompts, {first, first + static_cast<std::ptrdiff_t>(end - begin)}, options,
          answers)
        .run();
  }
  return answers;
}

}  // namespace megalodon::generate
