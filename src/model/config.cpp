#include "model/config.h"

#include <array>
#include <functional>

#include "base/error.h"

namespace megalodon::model {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // of any size: products of two fit into 63 bits

// One list of members for a family serves TOML, JSON and the checks: visit(name, member, low, high) or
// visit(name, member).
template <class Visitor>
void visit_members(MegalodonConfig& c, Visitor&& visit) {
  visit("vocab_size", c.vocab_size, 1, kMost);
  visit("num_layers", c.num_layers, 1, 4096);
  visit("model_dim", c.model_dim, 1, kMost);
  visit("num_heads", c.num_heads, 1, kMost);
  visit("z_dim", c.z_dim, 2, kMost);
  visit("value_dim", c.value_dim, 1, kMost);
  visit("ffn_hidden_dim", c.ffn_hidden_dim, 1, kMost);
  visit("cema_ndim", c.cema_ndim, 1, 1024);
  visit("chunk_size", c.chunk_size, 1, kMost);
  visit("norm_num_groups", c.norm_num_groups, 1, kMost);
  visit("norm_affine", c.norm_affine);
  visit("norm_eps", c.norm_eps, 1e-12, 1.0);
  visit("rope_base", c.rope_base, 1.0, 1e12);
  visit("swiglu", c.swiglu);
  visit("rescale_nffn", c.rescale_nffn);
  visit("scale_emb", c.scale_emb);
  visit("share_emb", c.share_emb);
  visit("dropout", c.dropout, 0.0, 0.99);
  visit("hidden_dropout", c.hidden_dropout, 0.0, 0.99);
  visit("attention_dropout", c.attention_dropout, 0.0, 0.99);
}

template <class Visitor>
void visit_members(LlamaConfig& c, Visitor&& visit) {
  visit("vocab_size", c.vocab_size, 1, kMost);
  visit("num_hidden_layers", c.num_hidden_layers, 1, 4096);
  visit("hidden_size", c.hidden_size, 1, kMost);
  visit("intermediate_size", c.intermediate_size, 1, kMost);
  visit("num_attention_heads", c.num_attention_heads, 1, kMost);
  visit("num_key_value_heads", c.num_key_value_heads, 1, kMost);
  visit("head_dim", c.head_dim, 1, kMost);
  visit("rms_norm_eps", c.rms_norm_eps, 1e-12, 1.0);
  visit("rope_theta", c.rope_theta, 1.0, 1e12);
  visit("position_embedding", c.position_embedding);
  visit("tie_word_embeddings", c.tie_word_embeddings);
  visit("initializer_range", c.initializer_range, 0.0, 10.0);
  visit("embedding_initializer_range", c.embedding_initializer_range, 0.0, 10.0);
  visit("dropout", c.dropout, 0.0, 0.99);
  visit("attention_dropout", c.attention_dropout, 0.0, 0.99);
}

// fail(key, what, what_to_do) does not return.
using Fail = std::function<void(std::string_view, const std::string&, const std::string&)>;

void require_divisor(const Fail& fail, const char* key, int64_t value, const char* divisor_key,
                     int64_t divisor) {
  if (value % divisor == 0) return;
  fail(key, std::to_string(value) + " is not divisible by " + divisor_key + " = " + std::to_string(divisor),
       "choose a multiple");
}

void check(const MegalodonConfig& c, const Fail& fail) {
  require_divisor(fail, "z_dim", c.z_dim, "num_heads", c.num_heads);
  require_divisor(fail, "value_dim", c.value_dim, "num_heads", c.num_heads);
  require_divisor(fail, "model_dim", c.model_dim, "norm_num_groups", c.norm_num_groups);
  if (c.head_dim() % 2 != 0) fail("z_dim", "z_dim / num_heads must be even", "rotary positions turn pairs");
  if (c.norm_num_groups == c.model_dim) {
    fail("norm_num_groups", "one feature a group has no variance at the first step",
         "choose less than model_dim");
  }
}

void check(const LlamaConfig& c, const Fail& fail) {
  require_divisor(fail, "num_attention_heads", c.num_attention_heads, "num_key_value_heads",
                  c.num_key_value_heads);
  if (c.position_embedding != "rope" && c.position_embedding != "none") {
    fail("position_embedding", "unknown value '" + c.position_embedding + "'", "use \"rope\" or \"none\"");
  }
  if (c.position_embedding == "rope" && c.head_dim % 2 != 0) {
    fail("head_dim", "head_dim must be even", "rotary positions turn pairs");
  }
}

struct TomlReader {
  Config& config;
  void operator()(const char* name, int64_t& member, int64_t low, int64_t high) const {
    const std::string key = std::string("model.") + name;
    member = member != 0 ? config.integer(key, low, high, member) : config.integer(key, low, high);
  }
  void operator()(const char* name, double& member, double low, double high) const {
    member = config.number(std::string("model.") + name, low, high, member);
  }
  void operator()(const char* name, bool& member) const {
    member = config.boolean(std::string("model.") + name, member);
  }
  void operator()(const char* name, std::string& member) const {
    member = config.string(std::string("model.") + name, member);
  }
};

struct JsonReader {
  const Json& json;
  std::string_view where;
  void operator()(const char* name, int64_t& member, int64_t low, int64_t high) const {
    member = json_member<int64_t>(json, name, where, member);
    check_range(name, member, low, high);
  }
  void operator()(const char* name, double& member, double low, double high) const {
    member = json_member<double>(json, name, where, member);
    check_range(name, member, low, high);
  }
  void operator()(const char* name, bool& member) const {
    member = json_member<bool>(json, name, where, member);
  }
  void operator()(const char* name, std::string& member) const {
    member = json_member<std::string>(json, name, where, member);
  }
  template <class T>
  void check_range(const char* name, T value, T low, T high) const {
    if (value >= low && value <= high) return;
    fail_request("'" + std::string(name) + "' is missing or out of range", where,
                 "expected " + Json(low).dump() + " to " + Json(high).dump());
  }
};

struct JsonWriter {
  Json& json;
  template <class T, class... Range>
  void operator()(const char* name, T& member, Range...) const {
    json[name] = member;
  }
};

MegalodonConfig preset(std::string_view name) {
  MegalodonConfig c;
  c.vocab_size = 32000;
  const auto set = [&](int64_t layers, int64_t D, int64_t H, int64_t F, int64_t G) {
    c.num_layers = layers;
    c.model_dim = D;
    c.num_heads = H;
    c.z_dim = D / 4;
    c.value_dim = 2 * D;
    c.ffn_hidden_dim = F;
    c.norm_num_groups = G;
  };
  if (name == "200M") set(12, 1024, 1, 2560, 32);
  if (name == "1.3B") set(24, 2048, 2, 4864, 64);
  if (name == "1.3B-pg19") set(24, 2048, 2, 3584, 64);
  if (name == "7B") set(32, 4096, 4, 11264, 64);
  if (name == "7B-swiglu") set(32, 4096, 4, 8192, 64);
  c.swiglu = name == "1.3B-pg19" || name == "7B-swiglu";
  c.scale_emb = c.share_emb = name == "1.3B-pg19";
  return c;
}

template <class Member>
Member read_members(Config& config, Member member) {
  visit_members(member, TomlReader{config});
  check(member, [&](std::string_view key, const std::string& what, const std::string& what_to_do) {
    config.fail("model." + std::string(key), what, what_to_do);
  });
  return member;
}

template <class Member>
Member read_members(const Json& json, std::string_view where) {
  Member member;
  visit_members(member, JsonReader{json, where});
  check(member, [&](std::string_view key, const std::string& what, const std::string& what_to_do) {
    fail_request("'" + std::string(key) + "': " + what, where, what_to_do);
  });
  return member;
}

// A Hugging Face Llama's members under the names used here, with what it leaves out. Variants that this Llama
// is not are refused rather than computed wrongly.
Json as_written_here(const Json& json, std::string_view where) {
  const auto refuse = [&](const std::string& what) {
    fail_request(what, where, "only the plain Llama is supported");
  };
  Json filled = json;
  const auto heads = json_member<int64_t>(json, "num_attention_heads", where);
  if (heads < 1) fail_request("'num_attention_heads' is out of range", where, "expected at least 1");
  if (!json.contains("num_key_value_heads")) filled["num_key_value_heads"] = heads;
  if (!json.contains("head_dim") || json["head_dim"].is_null()) {
    filled["head_dim"] = json_member<int64_t>(json, "hidden_size", where) / heads;
  }
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!json.contains(key) || json[key].is_null()) continue;
    const auto type = json_member<std::string>(json[key], "rope_type", where, "default");
    if (type != "default") refuse("rotary positions of type '" + type + "'");
    if (json[key].contains("rope_theta"))
      filled["rope_theta"] = json_member<double>(json[key], "rope_theta", where);
  }
  if (json_member<bool>(json, "attention_bias", where, false)) refuse("attention_bias");
  if (json_member<bool>(json, "mlp_bias", where, false)) refuse("mlp_bias");
  const auto activation = json_member<std::string>(json, "hidden_act", where, "silu");
  if (activation != "silu") refuse("hidden_act '" + activation + "'");
  return filled;
}

}  // namespace

std::string_view model_type(const ModelConfig& config) {
  return std::holds_alternative<MegalodonConfig>(config) ? "megalodon" : "llama";
}

int64_t vocab_size(const ModelConfig& config) {
  return std::visit([](const auto& c) { return c.vocab_size; }, config);
}

ModelConfig read_model_config(Config& config, int64_t vocabulary) {
  constexpr std::array<std::string_view, 2> types{"megalodon", "llama"};
  constexpr std::array<std::string_view, 6> presets{"", "200M", "1.3B", "1.3B-pg19", "7B", "7B-swiglu"};
  const auto type = config.choice("model.type", types, "megalodon");
  ModelConfig result;
  if (type == "megalodon") {
    auto c = preset(config.choice("model.preset", presets, ""));
    c.vocab_size = vocabulary;
    result = read_members(config, c);
  } else {
    LlamaConfig c;
    c.vocab_size = vocabulary;
    const int64_t heads = config.integer("model.num_attention_heads", 1, kMost);
    c.num_key_value_heads = heads;
    c.head_dim = config.integer("model.hidden_size", 1, kMost) / heads;
    if (c.head_dim == 0)
      config.fail("model.hidden_size", "smaller than num_attention_heads", "give each head a dimension");
    c.num_attention_heads = heads;
    result = read_members(config, c);
  }
  if (vocab_size(result) < vocabulary) {
    config.fail("model.vocab_size",
                "smaller than the tokenizer's vocabulary of " + std::to_string(vocabulary),
                "raise it or leave it out");
  }
  return result;
}

Json to_json(const ModelConfig& config) {
  Json json{{"model_type", model_type(config)}};
  auto copy = config;
  std::visit([&](auto& c) { visit_members(c, JsonWriter{json}); }, copy);
  if (std::holds_alternative<LlamaConfig>(config)) {
    json["architectures"] = {"LlamaForCausalLM"};
    json["hidden_act"] = "silu";
  }
  return json;
}

ModelConfig from_json(const Json& json, std::string_view where) {
  const auto type = json_member<std::string>(json, "model_type", where);
  if (type == "megalodon") return read_members<MegalodonConfig>(json, where);
  if (type != "llama")
    fail_request("unknown model_type '" + type + "'", where, "expected \"megalodon\" or \"llama\"");
  return read_members<LlamaConfig>(as_written_here(json, where), where);
}

}  // namespace megalodon::model
