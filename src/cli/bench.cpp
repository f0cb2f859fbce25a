#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>

#include "base/error.h"
#include "base/parallel.h"
#include "base/system.h"
#include "cli/command.h"
#include "cli/profile.h"
#include "generate/greedy.h"
#include "generate/stepper.h"
#include "model/streaming.h"
#include "ops/attention/attention.h"
#include "ops/cema/cema.h"
#include "ops/device.h"
#include "ops/float8/float8.h"
#include "ops/product.h"
#include "ops/timestep_norm/timestep_norm.h"
#include "train/training_step.h"

namespace megalodon::cli {
namespace {

struct Options {
  std::string what = "train", preset = "11M", device = "auto", compute_type = "bfloat16", trace;
  std::vector<int64_t> batches{4}, contexts{2048};
  int64_t batch = 0, context = 0;  // the present ones of these
  int64_t prompt = 36, fresh = 18, repeats = 5, dim = 512;
  at::Device on = at::kCPU;
  bool json = false, profiled = false, float8 = false, keeps_all = false;
  at::ScalarType type() const { return compute_type == "bfloat16" ? at::kBFloat16 : at::kFloat; }
  at::TensorOptions in(at::ScalarType scalar) const { return at::TensorOptions(on).dtype(scalar); }
};

// The names of CUDA kernels are long: what tells them apart stands at their ends.
std::string shortened(const std::string& name) {
  constexpr std::size_t kBegin = 70, kEnd = 40;
  if (name.size() <= kBegin + kEnd) return name;
  return name.substr(0, kBegin) + " ... " + name.substr(name.size() - kEnd);
}

void print_profile(const Options& o, const std::function<void()>& f) {
  constexpr std::size_t kMost = 40;
  const auto entries = profile(o.on, f, o.trace);
  double total = 0;
  for (const auto& entry : entries) total += entry.seconds;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const auto& [name, seconds, calls] = entries[i];
    if (o.json) {
      print_json({{"profile", name}, {"seconds", seconds}, {"calls", calls}});
    } else if (i < kMost) {
      std::printf("  %9.3f ms  %5.1f%%  %6lld x  %s\n", seconds * 1e3, 100 * seconds / total,
                  static_cast<long long>(calls), shortened(name).c_str());
    }
  }
  if (!o.json) std::printf("  %9.3f ms in %zu kinds of work\n", total * 1e3, entries.size());
}

// The middle one.
double median(std::vector<double> times) {
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

// The median of `repeats` timings after one that warms up; before(), if any, is not timed.
template <class F>
double median_seconds(const Options& o, int64_t repeats, const F& f,
                      const std::function<void()>& before = {}) {
  std::vector<double> times;
  for (int64_t i = 0; i <= repeats; ++i) {
    if (before) before();
    ops::synchronize(o.on);
    const double started = monotonic_seconds();
    f();
    ops::synchronize(o.on);
    const double seconds = monotonic_seconds() - started;
    if (i > 0) times.push_back(seconds);
  }
  return median(times);
}

// The same of a call f(i) among calls i = 0, 1, .. in a row; on a GPU by its own clock. Until all are
// launched it fills memory, so that launching them does not count.
template <class F>
double median_seconds_in_row(const Options& o, const F& f) {
  constexpr int64_t kInRow = 8, kFilled = int64_t{1} << 30;
  constexpr double kFastestFill = static_cast<double>(kFilled) / 8e12;  // seconds
  if (!o.on.is_cuda()) return median_seconds(o, o.repeats, [&] { f(0); });
  const auto stream = c10::impl::getDeviceGuardImpl(o.on.type())->getStream(o.on);
  auto filled = at::empty({kFilled}, o.in(at::kByte));
  std::vector<double> times;
  double launching = 0;
  for (int64_t repeat = -1; repeat <= o.repeats; ++repeat) {  // the first warms up, the second shows how long
    c10::Event begin(o.on.type(), c10::EventFlag::BACKEND_DEFAULT),
        end(o.on.type(), c10::EventFlag::BACKEND_DEFAULT);
    const auto fills = static_cast<int64_t>(std::ceil(1.5 * launching / kFastestFill));
    for (int64_t i = 0; i < fills; ++i) filled.zero_();
    begin.record(stream);
    const double started = monotonic_seconds();
    for (int64_t i = 0; i < kInRow; ++i) f(i);
    if (repeat == 0) launching = monotonic_seconds() - started;
    end.record(stream);
    ops::synchronize(o.on);
    if (repeat > 0) times.push_back(begin.elapsedTime(end) / 1e3 / kInRow);
  }
  return median(times);
}

// The two ceilings, measured: products of square matrices, and a large copy (bytes read and written).
double gemm_rate(const Options& o) {
  const int64_t n = o.on.is_cuda() ? 8192 : 2048;
  const auto a = at::randn({n, n}, o.in(o.type())), b = at::randn({n, n}, o.in(o.type()));
  return 2.0 * static_cast<double>(n * n * n) / median_seconds(o, 5, [&] { ops::product(a, b.t()); });
}
double copy_bandwidth(const Options& o) {
  const auto a = at::ones({int64_t{1} << (o.on.is_cuda() ? 30 : 26)}, o.on);
  auto b = at::empty_like(a);
  return 2.0 * static_cast<double>(a.nbytes()) / median_seconds(o, 5, [&] { b.copy_(a); });
}

struct Figure {
  std::string name;
  double seconds;
  double work;       // floating-point operations or bytes
  double ceiling;    // of the same in a second
  const char* unit;  // "FLOP" or "B"
  Json more = Json::object();
};

void print(const Options& o, const Figure& f) {
  const double rate = f.work / f.seconds;
  if (o.json) {
    Json object{{"name", f.name},
                {"seconds", f.seconds},
                {"rate", rate},
                {"unit", std::string(f.unit) + "/s"},
                {"ceiling", f.ceiling},
                {"ratio", rate / f.ceiling},
                {"device", c10::DeviceTypeName(o.on.type(), /*lower_case=*/true)},
                {"processor", processor_name()},
                {"threads", thread_count()}};
    object.update(f.more);
    return print_json(object);
  }
  std::printf("%-44s %9.3f ms  %8.1f G%s/s  %5.1f%% of %.0f", f.name.c_str(), f.seconds * 1e3, rate / 1e9,
              f.unit, 100 * rate / f.ceiling, f.ceiling / 1e9);
  for (const auto& [key, value] : f.more.items()) std::printf("  %s %s", key.c_str(), value.dump().c_str());
  std::printf("\n");
  std::fflush(stdout);
}

model::ModelConfig preset(const std::string& name) {
  const std::string small =
      "num_layers = 6\nmodel_dim = 384\nnum_heads = 3\nz_dim = 192\nvalue_dim = 384\nffn_hidden_dim = "
      "1024\nswiglu = true\n"
      "cema_ndim = 8\nchunk_size = 512\nnorm_num_groups = 32\n";
  const std::string llama =
      "type = \"llama\"\nnum_hidden_layers = 6\nhidden_size = 384\nintermediate_size = "
      "1104\nnum_attention_heads = 6\n";
  // The baseline that learns to solve problems (arXiv 2502.01612): its vocabulary is characters.
  const std::string nope =
      "type = \"llama\"\nnum_hidden_layers = 6\nhidden_size = 384\nintermediate_size = "
      "1536\nnum_attention_heads = 6\nposition_embedding = \"none\"\n";
  const auto text = name == "11M"         ? small
                    : name == "11M-llama" ? llama
                    : name == "14M-nope"  ? nope
                                          : "preset = \"" + name + "\"\n";
  auto config = Config::from_text("[model]\n" + text, "--preset");
  const auto result = model::read_model_config(config, name.starts_with("11M") ? 256
                                                       : name == "14M-nope"    ? 102
                                                                               : 32000);
  config.finish();
  return result;
}

// Floating-point operations of the matrix products and attention of a forward pass over one sequence of L
// tokens.
double forward_operations(const model::LanguageModel& model, int64_t L) {
  double weights = 0;
  for (const auto& parameter : model.parameters()) {
    if (parameter.is_matrix && parameter.name.find("embed") == std::string::npos)
      weights += static_cast<double>(parameter.value.numel());
  }
  const double length = static_cast<double>(L);
  double pairs_width =
      0;  // of all layers: (query, key) pairs times the dimensions of q k^T and of the weighted sum
  if (const auto* c = std::get_if<model::MegalodonConfig>(&model.config())) {
    const double chunk = static_cast<double>(std::min(L, c->chunk_size));
    pairs_width = static_cast<double>(c->num_layers * (c->z_dim + c->value_dim)) * length * (chunk + 1) / 2;
  } else {
    const auto& l = std::get<model::LlamaConfig>(model.config());
    pairs_width = static_cast<double>(l.num_hidden_layers * 2 * l.num_attention_heads * l.head_dim) * length *
                  (length + 1) / 2;
  }
  return 2 * weights * length + 2 * pairs_width;
}

void bench_train(const Options& o) {
  const auto model = model::make_model(preset(o.preset), 1);
  model->set_compute_type(o.type());
  model->to(o.on);
  if (o.float8 && !ops::has_float8_units(model->parameters()[0].value)) {
    fail_request("this device has no units for float8 products", "--float8",
                 "use a GPU of compute capability 8.9 or higher");
  }
  model->set_float8_products(o.float8);
  model->set_recomputation(!o.keeps_all);
  train::AdamW optimizer(model->parameters(), {});
  train::TrainingStep training_step(*model, optimizer);
  const auto tokens =
      at::randint(model::vocab_size(model->config()), {o.batch, o.context + 1}, o.in(at::kLong));
  const auto inputs = tokens.narrow(1, 0, o.context), targets = tokens.narrow(1, 1, o.context);
  const auto forward_backward = [&] {
    torch::autograd::backward({model->mean_loss(inputs, targets)}, {});
    for (const auto& parameter : model->parameters()) at::Tensor(parameter.value).mutable_grad().reset();
  };
  const auto step = [&] { training_step({inputs, targets, {}}, 1e-4); };
  const double work = 3 * forward_operations(*model, o.context) * static_cast<double>(o.batch),
               ceiling = gemm_rate(o);
  const auto report = [&](const std::string& name, double seconds) {
    print(o, {name + " " + o.preset + " " + (o.float8 ? "float8" : o.compute_type) +
                  (o.keeps_all ? " nothing recomputed " : " ") + std::to_string(o.batch) + " x " +
                  std::to_string(o.context),
              seconds,
              work,
              ceiling,
              "FLOP",
              {{"tokens_per_second", static_cast<double>(o.batch * o.context) / seconds},
               {"peak_bytes", o.on.is_cuda() ? ops::peak_device_bytes(o.on) : peak_resident_bytes()}}});
  };
  step();  // the second step of a shape may be recorded
  report("train step", median_seconds(o, o.repeats, step));
  report("forward + backward", median_seconds(o, o.repeats, forward_backward));
  if (o.profiled) print_profile(o, step);
}

// With its matrices in the compute type, as a model that only answers is loaded.
std::unique_ptr<model::LanguageModel> inference_model(const Options& o) {
  auto model = model::make_model(preset(o.preset), 1);
  model->set_compute_type(o.type());
  model->round_matrices();
  model->to(o.on);
  return model;
}

// Those of an answer: of a prompt the baseline's last layer works on the last token alone, but for keys and
// values.
double answer_operations(const model::LanguageModel& model, int64_t prompt, int64_t fresh) {
  double spared = 0;  // weights
  if (const auto* c = std::get_if<model::LlamaConfig>(&model.config())) {
    const auto last = "model.layers." + std::to_string(c->num_hidden_layers - 1) + ".";
    for (const auto& [name, value, is_matrix, rounded] : model.parameters()) {
      const bool of_keys =
          name.find("k_proj") != std::string::npos || name.find("v_proj") != std::string::npos;
      if (is_matrix && name.starts_with(last) && !of_keys) spared += static_cast<double>(value.numel());
    }
  }
  return forward_operations(model, prompt + fresh - 1) - 2 * spared * static_cast<double>(prompt - 1);
}

void bench_generate(const Options& o) {
  const auto model = inference_model(o);
  const auto ids = at::randint(model::vocab_size(model->config()), {o.batch, o.prompt}, at::kInt);
  std::vector<std::vector<int32_t>> prompts;
  for (int64_t i = 0; i < o.batch; ++i) {
    const auto* const first = ids.const_data_ptr<int32_t>() + i * o.prompt;
    prompts.emplace_back(first, first + o.prompt);
  }
  const generate::GreedyOptions greedy{.end = -1, .bound = o.fresh, .batch = o.batch};
  generate::GreedyDecoder decoder(*model);
  const auto answer = [&] { decoder.answer(prompts, greedy); };
  answer();
  const double seconds = median_seconds(o, o.repeats, answer);
  const auto answers = static_cast<double>(o.batch);
  print(o, {"generate " + o.preset + " " + o.compute_type + " " + std::to_string(o.batch) + " x (" +
                std::to_string(o.prompt) + " + " + std::to_string(o.fresh) + ")",
            seconds,
            answer_operations(*model, o.prompt, o.fresh) * answers,
            gemm_rate(o),
            "FLOP",
            {{"answers_per_second", answers / seconds},
             {"tokens_per_second", answers * static_cast<double>(o.fresh) / seconds}}});
  if (o.profiled) print_profile(o, answer);
}

// Reading a document of `context` tokens.
void bench_prefill(const Options& o) {
  const at::NoGradGuard no_grad;
  const ops::ConstantWeights constant_weights;
  const auto model = inference_model(o);
  const auto tokens = at::randint(model::vocab_size(model->config()), {o.batch, o.context}, o.in(at::kLong));
  const auto read = [&] {
    auto state = model->fresh_state(o.batch);
    model::stream(*model, tokens, state, {}, [](int64_t, const at::Tensor&) {});
  };
  const double seconds = median_seconds(o, o.repeats, read);
  print(o, {"prefill " + o.preset + " " + o.compute_type + " " + std::to_string(o.batch) + " x " +
                std::to_string(o.context),
            seconds,
            forward_operations(*model, o.context) * static_cast<double>(o.batch),
            gemm_rate(o),
            "FLOP",
            {{"tokens_per_second", static_cast<double>(o.batch * o.context) / seconds},
             {"peak_bytes", o.on.is_cuda() ? ops::peak_device_bytes(o.on) : peak_resident_bytes()}}});
  if (o.profiled) print_profile(o, read);
}

// What a step reads of a state: of keys and values those that are seen.
double bytes_read(const model::LanguageModel& model, const model::StreamState& state) {
  const auto* const c = std::get_if<model::MegalodonConfig>(&model.config());
  const int64_t seen = c != nullptr ? state.highest % c->chunk_size : state.highest;
  double bytes = 0;
  for (const auto& [name, tensor] : state.tensors) {
    const bool cache = model::StreamState::is_cache(name);  // [B, C, H, d]
    bytes += static_cast<double>(tensor.nbytes()) *
             (cache ? static_cast<double>(seen) / static_cast<double>(tensor.size(1)) : 1);
  }
  return bytes;
}

void time_decoding(const Options& o, const model::LanguageModel& model, double weight_bytes) {
  auto state = model.fresh_state(o.batch);
  // Of a far position Megalodon reads the chunk before and is said to stand there: all that its state holds.
  const auto* const c = std::get_if<model::MegalodonConfig>(&model.config());
  const int64_t length =
      c == nullptr ? o.context : std::min(o.context, c->chunk_size + o.context % c->chunk_size);
  const auto prompt = at::randint(model::vocab_size(model.config()), {o.batch, length}, o.in(at::kLong));
  model::stream(model, prompt, state, {}, [](int64_t, const at::Tensor&) {});
  state.move_to(o.context);
  const auto next = prompt.select(1, 0);
  generate::Stepper stepper(model);
  const auto step = [&] { stepper.step(next, state); };
  const auto back = [&] {  // so that every step is one at that position
    state.position.fill_(o.context);
    state.lowest = state.highest = o.context;
  };
  step();
  const double read = weight_bytes + bytes_read(model, state);
  const double seconds = median_seconds(o, o.repeats * 20, step, back);
  print(o, {"decode " + o.preset + " " + o.compute_type + " batch " + std::to_string(o.batch) + " at " +
                std::to_string(o.context),
            seconds,
            read,
            copy_bandwidth(o),
            "B",
            {{"tokens_per_second", static_cast<double>(o.batch) / seconds}}});
  back();
  if (o.profiled) print_profile(o, step);
}

void bench_decode(Options o) {
  const at::NoGradGuard no_grad;
  const ops::ConstantWeights constant_weights;
  const auto model = inference_model(o);
  double bytes = 0;
  for (const auto& parameter : model->parameters()) {
    if (parameter.name.find("embed") == std::string::npos)
      bytes += static_cast<double>(parameter.value.nbytes());
  }
  for (const int64_t batch : o.batches) {
    o.batch = batch;
    for (const int64_t context : o.contexts) {
      o.context = context;
      time_decoding(o, *model, bytes);
    }
  }
}

// An operator, timed on inputs that are made anew by `fresh` until they are too many for the caches of a GPU,
// one set after the other; what the last calls made stays, so that outputs are not written to one place.
struct Operator {
  std::string name;
  std::function<std::vector<at::Tensor>()> fresh;
  std::function<at::Tensor(const std::vector<at::Tensor>&)> f;
  double forward, backward, ceiling;  // work of the passes, and of a second
  const char* unit;
};

void bench_operator(const Options& o, const Operator& op) {
  constexpr std::size_t kOfCaches = std::size_t{256} << 20;
  std::vector<std::vector<at::Tensor>> inputs{op.fresh()};
  std::size_t bytes = 0;
  for (const auto& x : inputs[0]) bytes += x.nbytes();
  while (o.on.is_cuda() && inputs.size() * bytes < kOfCaches) inputs.push_back(op.fresh());
  const auto gradient = at::randn(op.f(inputs[0]).sizes(), o.in(o.type()));
  std::vector<std::vector<at::Tensor>> made(inputs.size());
  const auto report = [&](const std::string& what, double work, const auto& call) {
    const double seconds = median_seconds_in_row(o, [&](int64_t i) {
      const auto which = static_cast<std::size_t>(i) % inputs.size();
      made[which] = call(which);
    });
    print(o, {op.name + what + o.compute_type, seconds, work, op.ceiling, op.unit});
  };
  report(" forward ", op.forward, [&](std::size_t i) {
    const at::NoGradGuard no_grad;
    return std::vector<at::Tensor>{op.f(inputs[i])};
  });
  report(" forward + backward ", op.forward + op.backward,
         [&](std::size_t i) { return torch::autograd::grad({op.f(inputs[i])}, inputs[i], {gradient}); });
  std::vector<at::Tensor> results;
  for (const auto& x : inputs) results.push_back(op.f(x));
  report(" backward ", op.backward, [&](std::size_t i) {
    return torch::autograd::grad({results[i]}, inputs[i], {gradient}, /*retain_graph=*/true);
  });
}

// Heads of the small models and of the presets.
void bench_attention(const Options& o, double gemm) {
  struct Case {
    int64_t H, dz, dv, chunk;
  };
  const int64_t B = o.batch, L = o.context;
  for (const Case& c : {Case{3, 64, 128, 512}, {2, 256, 2048, 2048}}) {
    const auto random = [&](int64_t width, double scale) {
      return (at::randn({B, L, c.H, width}, o.in(o.type())) * scale).set_requires_grad(true);
    };
    const auto start = at::zeros({B}, o.in(at::kLong));
    const double pairs = static_cast<double>(B * L * c.H) * static_cast<double>(std::min(c.chunk, L) + 1) / 2;
    const double work = 2 * pairs * static_cast<double>(c.dz + c.dv);
    bench_operator(
        o, {.name = "attention " + std::to_string(c.dz) + "/" + std::to_string(c.dv) + " chunk " +
                    std::to_string(c.chunk),
            .fresh =
                [&] {
                  return std::vector{random(c.dz, 1 / std::sqrt(static_cast<double>(c.dz))), random(c.dz, 1),
                                     random(c.dv, 1)};
                },
            .f = [&](const auto& x) { return ops::attention(x[0], x[1], x[2], start, {.chunk = c.chunk}); },
            .forward = work,
            .backward = 2 * work,  // two products for each; scores that are made again do not count
            .ceiling = gemm,
            .unit = "FLOP"});
  }
}

void bench_operators(const Options& o) {
  const int64_t B = o.batch, L = o.context, D = o.dim, N = 16, G = 32;
  const double bandwidth = copy_bandwidth(o), gemm = gemm_rate(o), element = o.type() == at::kFloat ? 4 : 2;
  const auto leaf = [](const at::Tensor& x) { return x.detach().set_requires_grad(true); };
  const auto fresh_x = [&] { return leaf(at::randn({B, L, D}, o.in(o.type()))); };
  const double tensor = static_cast<double>(B * L * D) * element;
  const double forward = 2 * tensor, backward = 3 * tensor;  // x in, y out; x, dy in, dx out
  const auto number = o.in(at::kFloat);
  const auto p = leaf(at::rand({D, N}, number)), omega = leaf(at::randn({D}, number));
  const auto q = leaf(at::polar(at::rand({D, N}, number) * 0.5 + 0.49, at::rand({D, N}, number) * 6)),
             eta = leaf(at::view_as_complex(at::randn({D, N, 2}, number)));
  bench_operator(o, {.name = "cema " + std::to_string(D),
                     .fresh = [&] { return std::vector{fresh_x(), p, q, eta, omega}; },
                     .f = [](const auto& x) { return ops::cema(x[0], x[1], x[2], x[3], x[4]).y; },
                     .forward = forward,
                     .backward = backward,
                     .ceiling = bandwidth,
                     .unit = "B"});
  const auto weight = leaf(at::zeros({D}, number)), bias = leaf(at::zeros({D}, number));
  const ops::TimestepNormState none{at::zeros({B}, o.in(at::kLong)), at::zeros({B, G}, number),
                                    at::ones({B, G}, number)};
  bench_operator(o, {.name = "timestep_norm " + std::to_string(D),
                     .fresh = [&] { return std::vector{fresh_x(), weight, bias}; },
                     .f = [&](const auto& x) { return ops::timestep_norm(x[0], x[1], x[2], none).y; },
                     .forward = forward,
                     .backward = backward,
                     .ceiling = bandwidth,
                     .unit = "B"});
  bench_attention(o, gemm);
}

int run(Options o) {
  o.on = ops::open_device(o.device);
  const char* const several = o.batches.size() > 1    ? "--batch"
                              : o.contexts.size() > 1 ? "--context"
                                                      : nullptr;
  if (several != nullptr && o.what != "decode")
    fail_request("several sizes for " + o.what, several, "give one; several are for decode");
  if (several != nullptr && !o.trace.empty())
    fail_request("several sizes for one trace", several, "give one, or leave out --trace");
  if (!o.trace.empty() &&
      !std::ofstream(o.trace, std::ios::app))  // what is there stays until the run is over
    fail_request("the trace cannot be written", o.trace, "name a file in a folder that is there");
  o.batch = o.batches.front(), o.context = o.contexts.front();
  at::manual_seed(1);
  if (o.what == "train") bench_train(o);
  if (o.what == "prefill") bench_prefill(o);
  if (o.what == "decode") bench_decode(o);
  if (o.what == "generate") bench_generate(o);
  if (o.what == "ops") bench_operators(o);
  return 0;
}

}  // namespace

void add_bench(CLI::App& program, Run& chosen) {
  auto* command =
      program.add_subcommand("bench", "Time operators, training or decoding beside the measured ceiling");
  auto o = std::make_shared<Options>();
  command
      ->add_option(
          "WHAT", o->what,
          "ops, train, prefill (reading a document), decode (one token a call) or generate (greedy answers)")
      ->required()
      ->check(CLI::IsMember({"ops", "train", "prefill", "decode", "generate"}));
  command
      ->add_option("--preset", o->preset, "11M, 11M-llama, 14M-nope, 200M, 1.3B, 1.3B-pg19, 7B or 7B-swiglu")
      ->check(CLI::IsMember({"11M", "11M-llama", "14M-nope", "200M", "1.3B", "1.3B-pg19", "7B", "7B-swiglu"}))
      ->capture_default_str();
  command->add_option("--batch", o->batches, "sequences; decode: several numbers, with commas between")
      ->check(CLI::PositiveNumber)
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--context", o->contexts,
                   "tokens a sequence; decode: tokens read before, several numbers with commas between")
      ->check(CLI::PositiveNumber)
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--prompt", o->prompt, "generate: tokens of a prompt")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--new", o->fresh, "generate: tokens of an answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--dim", o->dim, "ops: features of CEMA and timestep norm, a multiple of 32")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--repeats", o->repeats, "timings, of which the median counts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--compute-type", o->compute_type, "float32 or bfloat16")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  add_device(*command, o->device);
  command->add_flag("--no-recompute", o->keeps_all,
                    "train: the backward pass finds everything kept, as with train.recompute = false");
  command->add_flag("--float8", o->float8, "train: products of linear layers in float8");
  command->add_flag("--profile", o->profiled, "all but ops: also the time of one run by kernel or operator");
  command
      ->add_option("--trace", o->trace,
                   "with --profile: file for what ran when (chrome://tracing, ui.perfetto.dev)")
      ->needs("--profile");
  command->add_flag("--json", o->json, "print one JSON object a line");
  command->callback([o, &chosen] { chosen = [o] { return run(*o); }; });
}

}  // namespace megalodon::cli
