#pragma once
#include <cmath>

#include "ops/cuda_step.h"
#include "ops/norm_cema_step/cuda_components.h"
#include "ops/rope/cuda_rotation.h"
#include "ops/step_program/cuda_words.h"

// Attention, and timestep norm with the moving average.
namespace megalodon::ops::cuda::step_program {

// Work that is shared among the blocks item by item. What prepare() reads no phase of the program writes.
template <class Work>
__device__ inline void do_items(Work work, int items) {
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    work.prepare(item);
    work.finish();
  }
}

class Attention {
 public:
  // Of a stream.
  struct Position {
    int id = -1, b = -1;  // of which phases it is, and of which stream
    int in_chunk, first_slot;

    // Whether it is a new one.
    __device__ bool update(const AttentionPhase& p, int b_) {
      if (id == p.place && b == b_) return false;
      const std::int64_t position = p.call.start[b_], of_chunk = position % p.call.chunk;
      id = p.place, b = b_, in_chunk = static_cast<int>(of_chunk);
      first_slot = static_cast<int>((position - of_chunk) % p.call.C);
      return true;
    }
  };
  struct Place : Position {
    float2 turn;  // of the thread's pair
  };
  struct Item {
    int split, group, head, b, of_stream;  // the head, of all and of the stream's

    Item() = default;
    __device__ Item(const AttentionPhase& p, int item) : split(item % kSplits) {
      const auto groups = static_cast<unsigned>(p.groups), heads = static_cast<unsigned>(p.call.H);
      const unsigned of_head = static_cast<unsigned>(item) / kSplits, all = of_head / groups;
      group = static_cast<int>(of_head - all * groups), head = static_cast<int>(all);
      b = static_cast<int>(all / heads), of_stream = head - b * static_cast<int>(heads);
    }
  };
  // The keys of a split.
  struct Keys {
    int seen, begin, end;  // seen: of the stream, by the query

    Keys() = default;
    __device__ Keys(const AttentionPhase& p, const Item& item, const Position& position)
        : seen(position.in_chunk + 1),
          first_slot_(position.first_slot),
          slots_(static_cast<int>(p.call.C)),
          key_step_(static_cast<int>(p.call.H * p.call.dz)),
          value_step_(static_cast<int>(p.call.H * p.call.dv)) {
      const int share = (seen + kSplits - 1) / kSplits;
      begin = min(item.split * share, seen), end = min(begin + share, seen);
      const std::int64_t first = item.b * p.call.C * p.call.H + item.of_stream;
      first_key_ = p.call.ring_k + first * p.call.dz, first_value_ = p.call.ring_v + first * p.call.dv;
    }
    __device__ Bfloat16* key(int i) const { return first_key_ + slot(i) * key_step_; }
    __device__ Bfloat16* value(int i) const { return first_value_ + slot(i) * value_step_; }

   private:
    __device__ int slot(int i) const {
      const int slot = first_slot_ + i;
      return slot < slots_ ? slot : slot - slots_;
    }
    int first_slot_, slots_, key_step_, value_step_;
    Bfloat16 *first_key_, *first_value_;  // of the head, in slot 0
  };

  __device__ Attention(const Words& words, const AttentionPhase& phase, float* memory, Place& place)
      : words_(words),
        place_(place),
        p_(phase),
        a_(phase.call),
        dz_(static_cast<int>(a_.dz)),
        dv_(static_cast<int>(a_.dv)),
        heads_(static_cast<int>(a_.H)),
        thread_(static_cast<int>(threadIdx.x)),
        lanes_(1 << phase.key_shift),
        lane_(thread_ & (lanes_ - 1)),
        team_(thread_ >> phase.key_shift),
        teams_(kThreads >> phase.key_shift),
        row_(thread_ >> phase.column_shift),
        rows_(kThreads >> phase.column_shift),
        query_(memory),
        weight_(query_ + kMostFeatures),
        of_thread_(weight_ + kMostKeys),
        newest_(reinterpret_cast<Bfloat16*>(of_thread_ + kThreads * 8)) {}

  __device__ static int items(const AttentionPhase& p) {
    return static_cast<int>(p.call.B * p.call.H) * p.groups * kSplits;
  }
  // By a warp: the item's keys and values, into the second cache.
  __device__ static void prefetch(const AttentionPhase& p, int index, Position& position) {
    const Item item(p, index);
    position.update(p, item.b);
    const Keys keys(p, item, position);
    const int dz = static_cast<int>(p.call.dz), dv = static_cast<int>(p.call.dv);
    const int lane = static_cast<int>(threadIdx.x) % 32, width = 8 << p.column_shift;
    const int of_key = (dz + 63) / 64, of_value = (width + 63) / 64;  // lines
    const int first_column = item.group * width;
#pragma unroll 1
    for (int i = keys.begin; i < keys.end; ++i) {
      if (i % p.groups == item.group && lane < of_key) cuda::prefetch(keys.key(i) + lane * 64);
      if (lane < of_value && first_column + lane * 64 < dv)
        cuda::prefetch(keys.value(i) + first_column + lane * 64);
    }
  }
  // Parameters, the turn of the thread's pair and the first keys.
  __device__ void prepare(int item) {
    item_ = Item(p_, item);
    if (place_.update(p_, item_.b))
      place_.turn = rotation(place_.in_chunk, rope_frequency(a_.log2_base, thread_, dz_));
    keys_ = Keys(p_, item_, place_);
    column_ = ((item_.group << p_.column_shift) + (thread_ & ((1 << p_.column_shift) - 1))) * 8;
    if (2 * thread_ < dz_) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = (i * heads_ + item_.of_stream) * dz_ + 2 * thread_;
        gamma_[i] = {read_parameter(a_.gamma + at), read_parameter(a_.gamma + at + 1)};
        beta_[i] = {read_parameter(a_.beta + at), read_parameter(a_.beta + at + 1)};
      }
    }
    if (keys_.begin < keys_.end) read_keys(team_);
  }
  __device__ void finish() {
    if (keys_.begin < keys_.end) read_values(row_);
    const bool has_newest = keys_.begin < keys_.end && keys_.end == keys_.seen, has_column = column_ < dv_;
    const int count = keys_.end - keys_.begin;
    const uint4 new_value = make_query_and_key(has_newest && has_column);
    score_keys(count);
    sync();
    const float2 moments = softmax_moments(count);

    float sum[8] = {};
#pragma unroll 1
    for (int begin = row_; has_column && begin < count; begin += rows_ * kAtOnce) {
      uint4 now[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) now[u] = v_[u];
      if (begin + rows_ * kAtOnce < count) read_values(begin + rows_ * kAtOnce);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = begin + u * rows_;
        if (keys_.begin + i == keys_.seen - 1) now[u] = new_value;
        const float w = i < count ? __expf(weight_[i] - moments.x) : 0;
        float columns[8];
        unpack<Bfloat16>(now[u], columns);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += w * columns[j];
      }
    }
    store(sum, of_thread_ + thread_ * 8);
    sync();
    const int width = 8 << p_.column_shift;
    const std::int64_t at = std::int64_t{item_.head} * kSplits + item_.split;
#pragma unroll 1
    for (int i = thread_; i < width && item_.group * width + i < dv_; i += kThreads) {
      float all = 0;
#pragma unroll 4
      for (int r = 0; r < rows_; ++r) all += of_thread_[r * width + i];
      words_.write(p_.partial + at * dv_ + item_.group * width + i, all);
    }
    if (item_.group == 0 && thread_ == 0)
      words_.write(p_.moments + 2 * at, moments.x), words_.write(p_.moments + 2 * at + 1, moments.y);
    if (has_newest) {
      if (item_.group == 0 && thread_ * 8 < dz_)
        *reinterpret_cast<uint4*>(keys_.key(keys_.seen - 1) + thread_ * 8) =
            *reinterpret_cast<const uint4*>(newest_ + thread_ * 8);
      if (row_ == 0 && has_column)
        *reinterpret_cast<uint4*>(keys_.value(keys_.seen - 1) + column_) = new_value;
    }
    sync();  // all is read before a further item's query is made
  }

 private:
  // Of the split's keys from `begin` on every so many; of the newest what its slot held before.
  __device__ void read_keys(int begin) {
    if (lane_ * 8 >= dz_) return;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      k_[u] = read_pack(keys_.key(min(keys_.begin + begin + u * teams_, keys_.end - 1)) + lane_ * 8);
  }
  __device__ void read_values(int begin) {
    if (column_ >= dv_) return;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      v_[u] = read_pack(keys_.value(min(keys_.begin + begin + u * rows_, keys_.end - 1)) + column_);
  }
  // Each warp finds the deviation for itself. Returns the thread's columns of the new value, if it wants
  // them.
  __device__ uint4 make_query_and_key(bool wants_value) {
    const std::int64_t z = std::int64_t{item_.head} * dz_,
                       value_at = std::int64_t{item_.head} * dv_ + column_;
    const int pack_at = thread_ % 32 * 8;
    const bool has_pack = pack_at < dz_, has_pair = 2 * thread_ < dz_;
    Words::Eight pack{}, value{};
    Word first_word = 0, second_word = 0;
    bool is_there = false;
    while (!is_there) {
      if (has_pack) pack = Words::ask_8(p_.z + z + pack_at);
      if (has_pair) {
        first_word = Words::ask(p_.z + z + 2 * thread_);
        second_word = Words::ask(p_.z + z + 2 * thread_ + 1);
      }
      if (wants_value) value = Words::ask_8(p_.v + value_at);
      is_there = (!has_pack | words_.is_new(pack)) &
                 (!has_pair | (words_.is_new(first_word) & words_.is_new(second_word))) &
                 (!wants_value | words_.is_new(value));
    }
    const float first = Words::value(first_word), second = Words::value(second_word);
    float v[8], squares = 0;
    unpack<Bfloat16>(Words::value(pack), v);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += v[j] * v[j];
    const float features = static_cast<float>(dz_);
    const float r = rsqrtf(warp_sum(squares) / features + a_.eps), scale = rsqrtf(features);
    if (has_pair) {
      const auto turned = [&](int i) {
        return rotate({first * r * ((1 + gamma_[i].x) * scale) + beta_[i].x,
                       second * r * ((1 + gamma_[i].y) * scale) + beta_[i].y},
                      place_.turn);
      };
      const float2 q = turned(0), k = turned(1);
      query_[2 * thread_] = q.x, query_[2 * thread_ + 1] = q.y;
      newest_[2 * thread_] = from_float<Bfloat16>(k.x), newest_[2 * thread_ + 1] = from_float<Bfloat16>(k.y);
    }
    sync();
    return Words::value(value);
  }
  __device__ void score_keys(int count) {
    float q[8] = {};
    if (lane_ * 8 < dz_) {
#pragma unroll
      for (int j = 0; j < 8; ++j) q[j] = query_[lane_ * 8 + j];
    }
#pragma unroll 1
    for (int begin = 0; begin < count; begin += teams_ * kAtOnce) {  // for all lanes of a warp
      uint4 now[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) now[u] = k_[u];
      if (begin + teams_ * kAtOnce < count) read_keys(begin + teams_ * kAtOnce + team_);
      float score[kAtOnce] = {};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (lane_ * 8 >= dz_) continue;
        if (keys_.begin + begin + u * teams_ + team_ == keys_.seen - 1)
          now[u] = *reinterpret_cast<const uint4*>(newest_ + lane_ * 8);
        float features[8];
        unpack<Bfloat16>(now[u], features);
#pragma unroll
        for (int j = 0; j < 8; ++j) score[u] += q[j] * features[j];
      }
#pragma unroll 1
      for (int offset = lanes_ / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) score[u] += __shfl_xor_sync(~0u, score[u], offset);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = begin + u * teams_ + team_;
        if (lane_ == 0 && i < count) weight_[i] = score[u];
      }
    }
  }
  // The largest score and the sum of exponentials relative to it, by each warp for itself.
  __device__ float2 softmax_moments(int count) const {
    const int lane = thread_ % 32;
    float most = -INFINITY, sum = 0;
    for (int i = lane; i < count; i += 32) most = fmaxf(most, weight_[i]);
    for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    for (int i = lane; i < count; i += 32) sum += __expf(weight_[i] - most);
    return {most, warp_sum(sum)};
  }

  const Words words_;
  Place& place_;
  const AttentionPhase& p_;
  const AttentionStep<Bfloat16>& a_;
  const int dz_, dv_, heads_, thread_;
  const int lanes_, lane_, team_, teams_;  // a team of threads takes a key, each 8 features of it
  const int row_, rows_;                   // of keys, for values
  float *query_, *weight_, *of_thread_;    // [kMostFeatures], [kMostKeys], [kThreads, 8]
  Bfloat16* newest_;                       // key, [kMostFeatures]
  Item item_;
  Keys keys_;
  int column_;
  float2 gamma_[2], beta_[2];  // gamma and beta for query and key
  uint4 k_[kAtOnce], v_[kAtOnce];
};

// What an attention's splits made becomes its output. An item: columns of a head.
class Join {
 public:
  static constexpr int kColumns = 32;

  __device__ Join(const Words& words, const AttentionPhase& phase)
      : words_(words), p_(phase), dv_(static_cast<int>(phase.call.dv)) {}
  __device__ static int items(const AttentionPhase& p) {
    return static_cast<int>(p.call.B * p.call.H * ((p.call.dv + kColumns - 1) / kColumns));
  }
  __device__ void prepare(int item) {
    const auto of_head = static_cast<unsigned>((dv_ + kColumns - 1) / kColumns),
               all = static_cast<unsigned>(item);
    head_ = static_cast<int>(all / of_head);
    column_ = static_cast<int>(all % of_head * kColumns + threadIdx.x);
  }
  __device__ void finish() {
    if (threadIdx.x >= kColumns || column_ >= dv_) return;
    const std::int64_t first = std::int64_t{head_} * kSplits, at = std::int64_t{head_} * dv_ + column_;
    Word gate;
    FloatWord partial[kSplits], largest[kSplits], exponentials[kSplits];
    bool is_there = false;
    while (!is_there) {
      gate = Words::ask(p_.gate + at);
#pragma unroll
      for (int i = 0; i < kSplits; ++i) {
        largest[i] = Words::ask(p_.moments + 2 * (first + i));
        exponentials[i] = Words::ask(p_.moments + 2 * (first + i) + 1);
        partial[i] = Words::ask(p_.partial + (first + i) * dv_ + column_);
      }
      is_there = words_.is_new(gate);
#pragma unroll
      for (int i = 0; i < kSplits; ++i)
        is_there &= words_.is_new(largest[i]) & words_.is_new(exponentials[i]) & words_.is_new(partial[i]);
    }
    float most = -INFINITY, sum = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kSplits; ++i) most = fmaxf(most, Words::value(largest[i]));
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      const float scale = __expf(Words::value(largest[i]) - most);
      sum += scale * Words::value(partial[i]), total += scale * Words::value(exponentials[i]);
    }
    words_.write(p_.o, p_.call.o, at, from_float<Bfloat16>(__fdividef(sum, total) * Words::value(gate)));
  }

 private:
  const Words words_;
  const AttentionPhase& p_;
  const int dv_;
  int head_, column_;
};

// Timestep norm and moving average of a group of features of a stream. `lanes` threads share a feature: each
// has four components of it.
class NormCema {
 public:
  __device__ NormCema(const Words& words, const NormCemaPhase& phase)
      : words_(words), phase_(phase), a_(phase.call), K_(static_cast<int>(a_.D / a_.G)) {}
  __device__ static int items(const NormCemaPhase& p) { return static_cast<int>(p.call.G * p.call.B); }

  // By a warp: parameters and states, into the second cache.
  __device__ static void prefetch(const NormCemaPhase& phase, int item) {
    const auto& a = phase.call;
    const int G = static_cast<int>(a.G), K = static_cast<int>(a.D / a.G);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t d = std::int64_t{item % G} * K, component = d * a.N;
    const float* const h = a.h + 2 * (std::int64_t{item / G} * a.D * a.N + component);
    const int components = K * static_cast<int>(a.N);
#pragma unroll 1
    for (int i = lane * 32; i < 2 * components; i += 32 * 32) {
      cuda::prefetch(a.q + 2 * component + i), cuda::prefetch(a.eta + 2 * component + i),
          cuda::prefetch(h + i);
      if (i < components) cuda::prefetch(a.p + component + i);
    }
    if (lane == 0)
      cuda::prefetch(a.mean + item), cuda::prefetch(a.var + item), cuda::prefetch(a.count + item / G);
#pragma unroll 1
    for (int i = lane * 32; i < K; i += 32 * 32) {
      cuda::prefetch(a.weight + d + i), cuda::prefetch(a.bias + d + i);
      if (a.N > 0) cuda::prefetch(a.omega + d + i);
    }
  }
  // Parameters and states.
  __device__ void prepare(int item) {
    const int lanes = lanes_of(a_.N), G = static_cast<int>(a_.G), thread = static_cast<int>(threadIdx.x);
    group_ = item % G, b_ = item / G;
    const int feature = thread / lanes, lane = thread % lanes;
    is_feature_ = feature < K_, is_first_ = is_feature_ && lane == 0,
    has_components_ = is_feature_ && 4 * lane < a_.N;
    d_ = group_ * K_ + (is_feature_ ? feature : 0);
    const std::int64_t component = std::int64_t{d_} * a_.N + (has_components_ ? 4 * lane : 0);
    at_h_ = 2 * (std::int64_t{b_} * a_.D * a_.N + component);
    if (has_components_) {
      const float4 p = __ldg(reinterpret_cast<const float4*>(a_.p + component));
      p_[0] = p.x, p_[1] = p.y, p_[2] = p.z, p_[3] = p.w;
    }
    q_ = load_complex(a_.q + 2 * component, has_components_);
    eta_ = load_complex(a_.eta + 2 * component, has_components_);
    h_ = load_complex(a_.h + at_h_, has_components_);
    weight_ = __ldg(a_.weight + d_), bias_ = __ldg(a_.bias + d_);
    omega_ = a_.N > 0 ? __ldg(a_.omega + d_) : 0;
    mean_ = a_.mean[std::int64_t{b_} * G + group_], var_ = a_.var[std::int64_t{b_} * G + group_];
    count_ = a_.count[b_];
  }
  __device__ void finish() {
    const std::int64_t at = std::int64_t{b_} * a_.D + d_;
    const std::int64_t first = std::int64_t{b_} * a_.D + group_ * K_;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // Of the thread's feature, and of the one that it takes to the moments.
    const auto ask = [&](std::int64_t i) { return Words::ask(phase_.x + i); };
    Word own = ask(at), other = ask(first + min(lane, K_ - 1));
    const double w = 1 / (static_cast<double>(count_) + 1);
    // While they are on their way: the average without them, and what it has of the feature.
    float rest = advance(h_, q_, p_, eta_, 0), gain = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) gain += eta_.re[j] * p_[j];
    for (int offset = lanes_of(a_.N) / 2; offset > 0; offset /= 2)
      rest += __shfl_xor_sync(~0u, rest, offset), gain += __shfl_xor_sync(~0u, gain, offset);
    gain += omega_;
    while (!(words_.is_new(own) && words_.is_new(other)))
      own = ask(at), other = ask(first + min(lane, K_ - 1));
    const float x = Words::value(own);
    const float2 of_step = moments(first, Words::value(other));
    const double distance = of_step.x - static_cast<double>(mean_);
    const double mean = mean_ + w * distance;
    const double var = (1 - w) * var_ + w * (of_step.y + (1 - w) * distance * distance);
    const float deviation = rsqrtf(static_cast<float>(var) + a_.eps);
    const Bfloat16 normal =
        from_float<Bfloat16>(static_cast<float>(x - mean) * deviation * (1 + weight_) + bias_);
    if (is_first_) words_.write(phase_.normal, a_.normal, at, normal);
    const float input = to_float(normal);
    if (is_first_ && a_.N > 0) words_.write(phase_.y, a_.y, at, from_float<Bfloat16>(rest + gain * input));
#pragma unroll
    for (int j = 0; j < 4; ++j) h_.re[j] += p_[j] * input;
    if (has_components_) store_complex(h_, a_.h + at_h_);
    sync();  // all threads have read the statistics, which may be replaced
    if (threadIdx.x == 0) {
      const std::int64_t at_group = std::int64_t{b_} * a_.G + group_;
      a_.next_mean[at_group] = static_cast<float>(mean), a_.next_var[at_group] = static_cast<float>(var);
      if (group_ == 0) a_.next_count[b_] = count_ + 1;
    }
  }

 private:
  // Mean of the group's features and of the squares of their distances to it, by each warp for itself.
  // `own`: the lane's feature. Sums are of distances to the group's first feature, which is not far from the
  // mean where the squares are small.
  __device__ float2 moments(std::int64_t first, float own) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float scale = 1 / static_cast<float>(K_), middle = __shfl_sync(~0u, own, 0);
    float sum = lane < K_ ? own - middle : 0, squares = sum * sum;
#pragma unroll 1
    for (int i = lane + 32; i < K_; i += 32) {
      Word word = 0;
      while (!words_.is_new(word)) word = Words::ask(phase_.x + first + i);
      const float x = Words::value(word);
      sum += x - middle, squares += (x - middle) * (x - middle);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(~0u, sum, offset), squares += __shfl_xor_sync(~0u, squares, offset);
    const float mean = sum * scale;
    return {middle + mean, squares * scale - mean * mean};
  }

  const Words words_;
  const NormCemaPhase& phase_;
  const NormCemaStep<Bfloat16>& a_;
  const int K_;
  int group_, b_, d_;
  bool is_feature_, is_first_, has_components_;
  std::int64_t at_h_, count_;
  float p_[4] = {}, weight_, bias_, omega_, mean_, var_;
  Complex4 q_, eta_, h_;
};

}  // namespace megalodon::ops::cuda::step_program
