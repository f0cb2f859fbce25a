#pragma once
#include <cstddef>
#include <vector>

#include "ops/step_program/phases.h"

// When the phases of a program come, which is the same for all blocks, and which tiles are whose.
namespace megalodon::ops::cuda::step_program {

// Layers of a linear phase that the attention behind it does not read come where blocks would wait: what its
// join reads while query and value are on their way, others while the sums of its splits are.
inline std::vector<Phase> fill_waits(const std::vector<Phase>& phases) {
  std::vector<Phase> filled;
  for (std::size_t i = 0; i < phases.size(); ++i) {
    const bool may_move = i + 1 < phases.size() && phases[i].kind == Phase::kLinear &&
                          phases[i + 1].kind == Phase::kAttention && !phases[i + 1].waits;
    if (!may_move) {
      filled.push_back(phases[i]);
      continue;
    }
    const LinearPhase& all = phases[i].linear;
    const AttentionPhase& attention = phases[i + 1].attention;
    enum Reader { kAttention, kJoin, kLater };
    const auto reader_of = [&](int l) {
      const Word* const y = all.words[l].y;
      const auto is_of = [&](const Word* read) {
        return y <= read && read < y + all.call.rows * all.call.layer[l].out;
      };
      if (is_of(attention.z) || is_of(attention.v)) return kAttention;
      return is_of(attention.gate) ? kJoin : kLater;
    };
    bool waits = phases[i].waits;
    const auto add_layers = [&](Reader reader) {
      Phase part = phases[i];
      auto& p = part.linear;
      part.waits = waits, p.call.layers = 0;
      for (int l = 0; l < all.call.layers; ++l) {
        if (reader_of(l) != reader) continue;
        p.call.layer[p.call.layers] = all.call.layer[l], p.words[p.call.layers] = all.words[l];
        ++p.call.layers;
      }
      if (p.call.layers > 0) filled.push_back(part), waits = false;
    };
    add_layers(kAttention), add_layers(kJoin);
    filled.push_back(phases[i + 1]);
    add_layers(kLater);
    ++i;
  }
  return filled;
}

inline bool has_same_input(const LinearPhase& a, int i, const LinearPhase& b, int j) {
  return a.words[i].x == b.words[j].x && has_same_input(a.call.layer[i], b.call.layer[j]) &&
         a.call.rows == b.call.rows && a.call.width == b.call.width && a.call.eps == b.call.eps;
}

inline void share_tiles(std::vector<Phase>& phases, unsigned blocks) {
  unsigned first_block = 0;             // behind those that have a tile more of the phase before
  const LinearPhase* before = nullptr;  // with its layer, the last one so far
  int layer = 0, input = 0;
  for (auto& phase : phases) {
    if (phase.kind != Phase::kLinear) continue;
    auto& p = phase.linear;
    place_tiles(p.call);
    p.share = {p.call.tiles / blocks, p.call.tiles % blocks, first_block};
    first_block = (first_block + p.share.more) % blocks;
    for (int l = 0; l < p.call.layers; ++l) {
      if (before != nullptr && !has_same_input(*before, layer, p, l)) ++input;
      p.words[l].input = input;
      before = &p, layer = l;
    }
    for (int l = p.call.layers - 1; l >= 0; --l) {
      const bool is_last = l + 1 == p.call.layers;
      p.words[l].same_until = is_last                                    ? p.call.tiles
                              : p.words[l + 1].input == p.words[l].input ? p.words[l + 1].same_until
                                                                         : p.call.layer[l + 1].first_tile;
    }
  }
}

}  // namespace megalodon::ops::cuda::step_program
