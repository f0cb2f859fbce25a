#include "model/projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "model/linear_products.h"
#include "ops/column_sum/column_sum.h"
#include "ops/embedding/embedding.h"
#include "ops/joined.h"
#include "ops/product.h"
#include "ops/product_rms_norm/product_rms_norm.h"
#include "ops/product_swiglu/product_swiglu.h"
#include "ops/skinny_linear/skinny_linear.h"

namespace megalodon::model {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Layers = std::vector<Linear>;

// The layer's result [..., out] of x [..., in].
at::Tensor value(const at::Tensor& x, Operand& operand, const Linear& layer, SavedWeight* saved = nullptr) {
  const auto onto = layer.added.defined() ? std::optional(rows_of(layer.added, layer.weight)) : std::nullopt;
  return linear(operand, layer.weight, layer.bias, onto, saved)
      .view(shape_with(x, layer.weight.value().size(-2)));
}

// Whether nobody else sees the memory of x, a gradient that an operator was handed.
bool is_own(const at::Tensor& x) {
  return x.use_count() == 1 && x.storage().use_count() == 1 && x.is_contiguous();
}

// The last result is x again. `biased`, `adding`: the layers of each bias and of what is added, in rising
// order, since a list for autograd holds no undefined tensors.
struct Projection : torch::autograd::Function<Projection> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights,
                               at::TensorList /*biases*/, at::TensorList /*added*/,
                               const std::vector<int64_t>& biased, const std::vector<int64_t>& adding,
                               const Layers& layers) {
    const at::AutoDispatchBelowADInplaceOrView below;  // so that results may be added to in place
    variable_list results, saved{x};
    Operand operand(x, Operand::Part::input);
    for (const auto& layer : layers) {
      SavedWeight weight;
      results.push_back(value(x, operand, layer, &weight));
      saved.insert(saved.end(), {weight.value, weight.scale});
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["biased"] = biased;
    ctx->saved_data["adding"] = adding;
    ctx->saved_data["type"] = weights[0].scalar_type();
    ctx->set_materialize_grads(false);
    results.push_back(x);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto biased = ctx->saved_data["biased"].toIntVector(),
               adding = ctx->saved_data["adding"].toIntVector();
    const auto type = ctx->saved_data["type"].toScalarType();  // of weights
    const auto& x = saved[0];
    const std::size_t layers = (saved.size() - 1) / 2;
    const std::size_t first_added = 1 + layers + biased.size();
    variable_list gradients(first_added + adding.size() + 3);  // the last are of `biased` and what follows it
    Operand input(x, Operand::Part::input_again);
    at::Tensor dx;
    if (const auto& d = dy.back(); d.defined()) dx = rows_of(is_own(d) ? d : d.clone(), saved[1]);
    for (std::size_t i = 0; i < layers; ++i) {
      if (!dy[i].defined()) continue;
      const SavedWeight weight{saved[1 + 2 * i], saved[2 + 2 * i]};
      Operand d(dy[i], Operand::Part::gradient);
      if (ctx->needs_input_grad(0)) add_input_gradient(dx, d, weight, x.scalar_type());
      if (ctx->needs_input_grad(1 + i)) gradients[1 + i] = weight_gradient(d, input, weight, type);
    }
    for (std::size_t b = 0; b < biased.size(); ++b) {
      const auto& d = dy[static_cast<std::size_t>(biased[b])];
      if (d.defined() && ctx->needs_input_grad(1 + layers + b))
        gradients[1 + layers + b] = ops::column_sum(d.reshape({-1, d.size(-1)}));
    }
    for (std::size_t a = 0; a < adding.size(); ++a)
      gradients[first_added + a] = dy[static_cast<std::size_t>(adding[a])];
    if (dx.defined()) gradients[0] = dx.view(x.sizes());
    return gradients;
  }
};

std::vector<int64_t> widths_of(at::TensorList weights) {
  std::vector<int64_t> widths;
  for (const auto& w : weights) widths.push_back(w.size(0));
  return widths;
}

// Of x and weights that lie together as `weight` [sum of out, in].
variable_list joint_result(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef widths) {
  const auto y = ops::tall_product(rows_of(x, weight), weight);
  return y.view(shape_with(x, weight.size(0))).split_with_sizes(widths, -1);
}

// The same, or with `for_swiglu` the two of them and SwiGLU of these, without a gradient.
variable_list joint_results(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            at::IntArrayRef widths, bool for_swiglu) {
  if (!for_swiglu) return joint_result(x, weight, widths);
  const auto shape = shape_with(x, widths[0]);
  const auto [a, b, y] = ops::product_swiglu(rows_of(x, weight), weight);
  variable_list results{a.view(shape), b.view(shape), y.view(shape)};
  ctx->mark_non_differentiable({results[2]});
  return results;
}

// The gradients of such results of x as the rows of one.
at::Tensor joint_gradient(const variable_list& dy, const at::Tensor& x, const at::Tensor& weight,
                          at::IntArrayRef widths) {
  variable_list parts;
  for (std::size_t i = 0; i < widths.size(); ++i)
    parts.push_back(dy[i].defined() ? dy[i] : at::zeros(shape_with(x, widths[i]), x.options()));
  const auto whole = ops::joined(parts, -1);
  return rows_of(whole.defined() ? whole : at::cat(parts, -1), weight);
}

// And those of its weights, in `type`.
std::vector<at::Tensor> joint_weight_gradients(const at::Tensor& d, const at::Tensor& x,
                                               const at::Tensor& weight, at::IntArrayRef widths,
                                               at::ScalarType type) {
  return ops::product(d.t(), rows_of(x, weight), type).split_with_sizes(widths);
}

// Of layers whose weights lie together as `weight` [sum of out, in]: the results are columns of one tensor.
// Of rows x that tokens choose, these choose among the results.
struct JointProjection : torch::autograd::Function<JointProjection> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList weights,
                               const at::Tensor& weight, bool for_swiglu,
                               const std::optional<at::Tensor>& tokens) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto widths = widths_of(weights);
    ctx->save_for_backward({x, weight, tokens.value_or(at::Tensor())});
    ctx->saved_data["widths"] = widths;
    ctx->saved_data["type"] = weights[0].scalar_type();
    ctx->set_materialize_grads(tokens.has_value());
    if (tokens) return ops::chosen_rows(ops::product(x, weight.t()), *tokens).split_with_sizes(widths, -1);
    return joint_results(ctx, x, weight, widths, for_swiglu);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &tokens = saved[2];
    const auto widths = ctx->saved_data["widths"].toIntVector();
    auto d = joint_gradient(dy, x, weight, widths);
    if (tokens.defined()) d = ops::token_sums(d, tokens, x.size(0)).to(d.scalar_type());
    variable_list gradients;
    gradients.push_back(ctx->needs_input_grad(0) ? ops::product(d, weight).view(x.sizes()) : at::Tensor());
    const auto type = ctx->saved_data["type"].toScalarType();
    for (const auto& part : joint_weight_gradients(d, x, weight, widths, type)) gradients.push_back(part);
    gradients.resize(gradients.size() + 3);  // of `weight` and what follows it
    return gradients;
  }
};

// A product that is left to a norm, for autograd.
struct LeftProjection : torch::autograd::Function<LeftProjection> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& /*x*/, const at::Tensor& weight,
                            const LeftProduct& product) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({product.input, product.weight});
    ctx->saved_data["type"] = weight.scalar_type();
    return product.placeholder();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], d = rows_of(dy[0], weight);
    const auto type = ctx->saved_data["type"].toScalarType();
    return {ops::tall_product(d, weight.t().contiguous()).view(x.sizes()),
            ops::product(d.t(), rows_of(x, weight), type),
            {}};
  }
};

// The sum of a stream with a product that was left, normalised; and 1 / sqrt(mean(sum^2) + eps) of each row.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_of_product(const LeftProduct& product,
                                                               const at::Tensor& x, const at::Tensor& factor,
                                                               double eps) {
  const auto &input = product.input, &weight = product.weight;
  const auto [sum, normal, rstd] =
      ops::product_rms_norm(rows_of(input, weight), weight, rows_of(x, weight), factor, eps);
  return {sum.view(x.sizes()), normal.view(x.sizes()), rstd};
}

// The same of a residual stream's normalised sum with `added`; the sum is the first result.
struct NormJointProjection : torch::autograd::Function<NormJointProjection> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& added,
                               const at::Tensor& factor, at::TensorList weights, const at::Tensor& weight,
                               double eps, bool for_swiglu, const LeftProduct& product) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto widths = widths_of(weights);
    const auto [sum, normal, rstd] =
        product.defined() ? norm_of_product(product, x, factor, eps)
                          : ops::add_rms_norm_forward(x, added, factor, eps, weight.scalar_type());
    ctx->save_for_backward({sum, factor, rstd, normal, weight});
    ctx->saved_data["widths"] = widths;
    ctx->saved_data["type"] = weights[0].scalar_type();
    ctx->set_materialize_grads(false);
    auto results = joint_results(ctx, normal, weight, widths, for_swiglu);
    results.insert(results.begin(), sum);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto &sum = saved[0], &factor = saved[1], &rstd = saved[2], &normal = saved[3], &weight = saved[4];
    const auto widths = ctx->saved_data["widths"].toIntVector();
    const auto d = joint_gradient({dy.begin() + 1, dy.end()}, normal, weight, widths);
    const auto d_sum = dy[0].defined() ? std::optional(rows_of(dy[0], weight)) : std::nullopt;
    const auto [dx, d_added, d_factor] =
        ops::product_rms_norm_gradients(d, weight, rows_of(sum, weight), factor, rstd, d_sum);
    variable_list gradients{dx.view(sum.sizes()), d_added.view(sum.sizes()), d_factor};
    const auto type = ctx->saved_data["type"].toScalarType();
    for (const auto& part : joint_weight_gradients(d, normal, weight, widths, type))
      gradients.push_back(part);
    gradients.resize(gradients.size() + 4);  // of `weight` and what follows it
    return gradients;
  }
};

// The weights of `layers` as one, where a GPU should take them so.
at::Tensor joint_weight(const at::Tensor& x, std::initializer_list<Linear> layers) {
  if (!x.is_cuda() || layers.size() == 1 || ops::has_skinny_kernel(x)) return {};
  const auto type = x.scalar_type();
  std::vector<at::Tensor> weights;
  for (const auto& [weight, bias, added] : layers) {
    if (bias.defined() || added.defined() || weight.value().dim() != 2 || weight.in_float8()) return {};
    weights.push_back(weight.value().scalar_type() == type ? weight.value() : weight.kept(type));
  }
  return ops::joined(weights, 0);
}

// The same where the norm before the layers has its gradient in their product's; x as these read it.
at::Tensor joint_weight_behind_norm(const at::Tensor& x, std::initializer_list<Linear> layers) {
  if (!at::GradMode::is_enabled()) return {};
  auto weight = joint_weight(x, layers);
  if (!weight.defined() || !ops::has_product_rms_norm_kernel(weight, weight.size(0), weight.size(1)))
    return {};
  return weight;
}

at::Tensor joint_weight(const NormInput& input, std::initializer_list<Linear> layers) {
  return input.added ? joint_weight_behind_norm(input.added->value, layers) : at::Tensor();
}

// The same of a stream that many tokens choose from a table of few rows.
at::Tensor joint_weight_behind_table(const NormInput& input, std::initializer_list<Linear> layers) {
  if (!input.lookup || !at::GradMode::is_enabled()) return {};
  const auto& [table, tokens] = *input.lookup;
  if (table.dim() != 2 || table.size(0) > table.size(1) || 8 * table.size(0) > tokens.numel()) return {};
  return joint_weight(at::empty({0}, table.options().dtype(input.type)), layers);
}

variable_list norm_joint_results(const NormInput& input, at::TensorList weights, const at::Tensor& joint,
                                 bool for_swiglu) {
  TORCH_INTERNAL_ASSERT(input.added.has_value());
  return NormJointProjection::apply(input.x, input.added->value, input.factor, weights, joint, input.eps,
                                    for_swiglu, input.added->product);
}

variable_list weights_of(std::initializer_list<Linear> layers) {
  variable_list weights;
  for (const auto& layer : layers) weights.push_back(layer.weight);
  return weights;
}

}  // namespace

std::vector<at::Tensor> project_and_pass(const at::Tensor& x, std::initializer_list<Linear> layers) {
  if (layers.begin()->weight.value().dim() == 2 && ops::has_skinny_kernel(x)) {
    std::vector<ops::SkinnyLayer> skinny;
    for (const auto& layer : layers)
      skinny.push_back({.x = x, .weight = layer.weight, .bias = layer.bias, .add = layer.added});
    auto results = ops::skinny_linear(skinny);
    results.push_back(x);
    return results;
  }
  if (!at::GradMode::is_enabled()) {
    variable_list results;
    Operand operand(x, Operand::Part::input);
    for (const auto& layer : layers) results.push_back(value(x, operand, layer));
    results.push_back(x);
    return results;
  }
  variable_list weights, biases, all_added;
  std::vector<int64_t> biased, adding;
  for (const auto& [weight, bias, added] : layers) {
    const auto index = static_cast<int64_t>(weights.size());
    if (bias.defined()) biased.push_back(index), biases.push_back(bias);
    if (added.defined()) adding.push_back(index), all_added.push_back(added);
    weights.push_back(weight);
  }
  return Projection::apply(x, at::TensorList(weights), at::TensorList(biases), at::TensorList(all_added),
                           biased, adding, Layers(layers));
}

std::vector<at::Tensor> project(const at::Tensor& x, std::initializer_list<Linear> layers) {
  if (const auto joint = joint_weight(x, layers); joint.defined()) {
    const auto weights = weights_of(layers);
    if (!at::GradMode::is_enabled()) return joint_result(x, joint, widths_of(weights));
    return JointProjection::apply(x, at::TensorList(weights), joint, false, std::nullopt);
  }
  auto results = project_and_pass(x, layers);
  results.pop_back();
  return results;
}

SwigluInputs project_for_swiglu(const at::Tensor& x, const Weight& a, const Weight& b) {
  if (const auto joint = joint_weight(x, {{a}, {b}}); joint.defined()) {
    const variable_list weights{a, b};
    if (!at::GradMode::is_enabled()) {
      const auto y = ops::product_swiglu(rows_of(x, joint), joint, false).y;
      return {{}, {}, y.view(shape_with(x, a.value().size(0)))};
    }
    const auto results = JointProjection::apply(x, at::TensorList(weights), joint, true, std::nullopt);
    return {results[0], results[1], results[2]};
  }
  const auto results = project(x, {{a}, {b}});
  return {results[0], results[1]};
}

at::Tensor LeftProduct::placeholder() const {
  return at::empty({1}, input.options()).expand(shape_with(input, weight.size(0)));
}

ops::AddRmsNorm norm(const NormInput& input) {
  const auto& [x, added, factor, eps, type, lookup] = input;
  if (!added) return ops::add_rms_norm(x, std::nullopt, factor, eps, type);
  if (!added->product.defined()) return ops::add_rms_norm(x, added->value, factor, eps, type);
  const auto made = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return norm_of_product(added->product, x, factor, eps);
  };
  return ops::add_rms_norm_results(x, added->value, factor, made());
}

LeftProduct leave_to_norm(const at::Tensor& x, const Weight& weight, std::initializer_list<Linear> behind) {
  const auto& w = weight.value();
  if (w.dim() != 2 || weight.in_float8() || !ops::has_product_rms_norm_kernel(x, w.size(1), w.size(0)))
    return {};
  if (behind.size() == 0 ? !at::GradMode::is_enabled() : !joint_weight_behind_norm(x, behind).defined())
    return {};
  return {x, weight.in(x.scalar_type()).detach()};
}

Addend project_for_norm(const at::Tensor& x, const Weight& weight, std::initializer_list<Linear> behind) {
  const auto product = leave_to_norm(x, weight, behind);
  if (!product.defined()) return {project(x, weight)};
  return {LeftProjection::apply(x, weight.value(), product), product};
}

NormProjections norm_and_project(const NormInput& input, std::initializer_list<Linear> layers) {
  if (const auto joint = joint_weight(input, layers); joint.defined()) {
    const auto weights = weights_of(layers);
    auto results = norm_joint_results(input, weights, joint, false);
    return {results[0], {results.begin() + 1, results.end()}};
  }
  if (const auto joint = joint_weight_behind_table(input, layers); joint.defined()) {
    TORCH_INTERNAL_ASSERT(input.lookup.has_value());
    const auto& [table, tokens] = *input.lookup;
    const auto rows = norm({table, {}, input.factor, input.eps, input.type}).normal;  // [V, D]
    const auto weights = weights_of(layers);
    return {input.x, JointProjection::apply(rows, at::TensorList(weights), joint, false, tokens)};
  }
  const auto [sum, normal] = norm(input);
  return {sum, project(normal, layers)};
}

NormSwigluInputs norm_and_project_for_swiglu(const NormInput& input, const Weight& a, const Weight& b) {
  if (const auto joint = joint_weight(input, {{a}, {b}}); joint.defined()) {
    const auto results = norm_joint_results(input, {a, b}, joint, true);
    return {results[0], {results[1], results[2], results[3]}};
  }
  const auto [sum, normal] = norm(input);
  return {sum, project_for_swiglu(normal, a, b)};
}

at::Tensor project(const at::Tensor& x, const Weight& weight, const Weight& bias) {
  return project(x, {{weight, bias}})[0];
}

}  // namespace megalodon::model
