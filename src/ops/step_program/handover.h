#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <variant>
#include <vector>

#include "ops/cuda_device.h"
#include "ops/step_program/cuda.h"
#include "ops/step_program/phases.h"

namespace megalodon::ops::cuda::step_program {

inline std::int64_t round_up(std::int64_t words) {
  return ceil_div(words, 4) * 4;
}

// Numbers that a call makes, in the order in which they get their words.
struct Numbers {
  const Bfloat16* plain;
  std::int64_t count;
};
inline std::vector<Numbers> outputs_of(const StepCall& call) {
  if (const auto* c = std::get_if<SkinnyCall>(&call)) {
    std::vector<Numbers> outputs;
    for (int l = 0; l < c->layers; ++l) outputs.push_back({c->layer[l].y, c->rows * c->layer[l].out});
    return outputs;
  }
  if (const auto* n = std::get_if<NormCemaStep<Bfloat16>>(&call))
    return {{n->normal, n->B * n->D}, {n->y, n->B * n->D}};
  const auto& a = std::get<AttentionStep<Bfloat16>>(call);
  return {{a.o, a.B * a.H * a.dv}};
}

// What the calls of a program leave to each other, by the memory where their outputs would be.
class Handover {
 public:
  Handover(const std::vector<StepCall>& calls, Word* words) : next_(words) {
    for (std::size_t i = 0; i < calls.size(); ++i) {
      for (const auto& [plain, count] : outputs_of(calls[i]))
        outputs_.push_back({range(plain, 2 * count), i});
      if (const auto* n = std::get_if<NormCemaStep<Bfloat16>>(&calls[i]))
        outputs_.push_back({range(n->next_count, 8 * n->B), i});
    }
  }

  void begin_call(std::size_t call) { call_ = call; }
  // Whether the call writes where one before it reads what was there before the program.
  bool overwrites_input() const {
    return std::ranges::any_of(outputs_, [&](const Span& output) {
      return output.call == call_ && !is_replaced(output.range) &&
             std::ranges::any_of(inputs_, [&](const Span& input) {
               return input.call < call_ && meet(input.range, output.range);
             });
    });
  }
  // The words of the last call that made `count` numbers there; null where none did.
  const Word* find(const Bfloat16* plain, std::int64_t count) {
    if (plain == nullptr) return nullptr;
    const Range wanted = range(plain, 2 * count);
    for (auto made = made_.rbegin(); made != made_.rend(); ++made) {
      if (!meet(wanted, made->range)) continue;
      if (wanted.begin < made->range.begin || wanted.end > made->range.end)
        throw std::runtime_error("[step_program] an input reaches beyond the output that it is part of");
      return made->words + (wanted.begin - made->range.begin) / 2;
    }
    inputs_.push_back({wanted, call_});
    return nullptr;
  }
  // Words for what the call makes. Plain numbers that a later call replaces need not be written.
  Word* add(Bfloat16*& plain, std::int64_t count) {
    const Range made = range(plain, 2 * count);
    made_.push_back({made, next_});
    next_ += round_up(count);
    if (is_replaced(made)) plain = nullptr;
    return made_.back().words;
  }

 private:
  struct Range {
    std::uintptr_t begin, end;
  };
  struct Span {
    Range range;
    std::size_t call;
  };
  struct Made {
    Range range;
    Word* words;
  };
  static Range range(const void* from, std::int64_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(from);
    return {begin, begin + static_cast<std::uintptr_t>(bytes)};
  }
  static bool meet(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }
  bool is_replaced(const Range& made) const {
    return std::ranges::any_of(
        outputs_, [&](const Span& output) { return output.call > call_ && meet(output.range, made); });
  }

  std::vector<Span> outputs_, inputs_;  // of all calls; of those so far, what is from outside
  std::vector<Made> made_;
  Word* next_;
  std::size_t call_ = 0;
};

}  // namespace megalodon::ops::cuda::step_program
