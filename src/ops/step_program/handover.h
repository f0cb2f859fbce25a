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

struct Numbers {
  const Bfloat16* plain;
  std::int64_t count;
};
// That a call reads.
inline std::vector<Numbers> inputs_of(const StepCall& call) {
  if (const auto* c = std::get_if<SkinnyCall>(&call)) {
    std::vector<Numbers> inputs;
    for (int l = 0; l < c->layers; ++l) {
      inputs.push_back({c->layer[l].x, c->rows * c->width});
      if (c->layer[l].add != nullptr) inputs.push_back({c->layer[l].add, c->rows * c->layer[l].out});
    }
    return inputs;
  }
  if (const auto* n = std::get_if<NormCemaStep<Bfloat16>>(&call)) return {{n->x, n->B * n->D}};
  const auto& a = std::get<AttentionStep<Bfloat16>>(call);
  const std::int64_t heads = a.B * a.H;
  return {{a.z, heads * a.dz}, {a.v, heads * a.dv}, {a.gate, heads * a.dv}};
}
// That a call makes, in the order in which they get their words.
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
  // Without words it says how many there have to be.
  explicit Handover(const std::vector<StepCall>& calls, Word* words = nullptr) : first_word_(words) {
    for (std::size_t i = 0; i < calls.size(); ++i) {
      for (const auto& [plain, count] : inputs_of(calls[i])) {
        const Range read = range(plain, 2 * count);
        const bool is_made =
            std::ranges::any_of(outputs_, [&](const Output& output) { return meet(output.range, read); });
        if (is_made || (find_made(read) != nullptr && find_made(read)->range.contains(read))) continue;
        copies_.push_back({plain, give_words(read, count), count});
      }
      for (const auto& [plain, count] : outputs_of(calls[i])) {
        outputs_.push_back({range(plain, 2 * count), i});
        words_ += round_up(count);
      }
      if (const auto* n = std::get_if<NormCemaStep<Bfloat16>>(&calls[i]))
        outputs_.push_back({range(n->next_count, 8 * n->B), i});
    }
    for (const auto& copy : copies_) words_ += round_up(copy.count);
  }

  // What calls read that was there before the program.
  const std::vector<CopyPhase>& copies() const { return copies_; }
  std::int64_t words() const { return words_; }  // of all copies and outputs

  void begin_call(std::size_t call) { call_ = call; }
  // Whether the call writes where copies read.
  bool overwrites_input() const {
    return std::ranges::any_of(outputs_, [&](const Output& output) {
      return output.call == call_ && !is_replaced(output.range) &&
             std::ranges::any_of(copies_, [&](const CopyPhase& copy) {
               return meet(range(copy.from, 2 * copy.count), output.range);
             });
    });
  }
  // The words of the last call that made `count` numbers there, or of their copy; null for null.
  const Word* find(const Bfloat16* plain, std::int64_t count) const {
    if (plain == nullptr) return nullptr;
    const Range wanted = range(plain, 2 * count);
    const Made* const made = find_made(wanted);
    if (made == nullptr || !made->range.contains(wanted))
      throw std::runtime_error("[step_program] an input reaches beyond the output that it is part of");
    return word(made->first_word + static_cast<std::int64_t>(wanted.begin - made->range.begin) / 2);
  }
  // Words for what the call makes. Plain numbers that a later call replaces need not be written.
  Word* add(Bfloat16*& plain, std::int64_t count) {
    const Range made = range(plain, 2 * count);
    if (is_replaced(made)) plain = nullptr;
    return give_words(made, count);
  }

 private:
  struct Range {
    std::uintptr_t begin, end;
    bool contains(const Range& other) const { return begin <= other.begin && other.end <= end; }
  };
  struct Output {
    Range range;
    std::size_t call;
  };
  struct Made {
    Range range;
    std::int64_t first_word;
  };
  static Range range(const void* from, std::int64_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(from);
    return {begin, begin + static_cast<std::uintptr_t>(bytes)};
  }
  static bool meet(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }
  bool is_replaced(const Range& made) const {
    return std::ranges::any_of(
        outputs_, [&](const Output& output) { return output.call > call_ && meet(output.range, made); });
  }
  const Made* find_made(const Range& wanted) const {
    for (std::size_t i = made_.size(); i-- > 0;)
      if (meet(wanted, made_[i].range)) return &made_[i];
    return nullptr;
  }
  Word* give_words(const Range& made, std::int64_t count) {
    made_.push_back({made, given_});
    given_ += round_up(count);
    return word(made_.back().first_word);
  }
  Word* word(std::int64_t i) const { return first_word_ == nullptr ? nullptr : first_word_ + i; }

  std::vector<Output> outputs_;  // of all calls
  std::vector<CopyPhase> copies_;
  std::vector<Made> made_;  // so far
  Word* first_word_;
  std::int64_t given_ = 0, words_ = 0;
  std::size_t call_ = 0;
};

}  // namespace megalodon::ops::cuda::step_program
