#include "ops/embedding/embedding.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/product.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kMostRows = 400;  // of a table whose sums fit the shared memory of a multiprocessor

struct Embedding : torch::autograd::Function<Embedding> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& table, const at::Tensor& tokens) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({tokens});
    ctx->saved_data["V"] = table.size(0);
    return chosen_rows(table, tokens);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t);
    static const auto op = registered<Backward>("megalodon::embedding_backward");
    const auto tokens = ctx->get_saved_variables()[0];
    return {op.call(dy[0].flatten(0, -2), tokens.flatten(), ctx->saved_data["V"].toInt()), {}};
  }
};

}  // namespace

at::Tensor embedding(const at::Tensor& table, const at::Tensor& tokens) {
  TORCH_CHECK(table.dim() == 2, "[embedding] table: expected two dimensions, got shape ", table.sizes());
  check_type("embedding", "tokens", tokens, at::kLong);
  const bool has_kernel = table.is_cuda() && has_fast_kernel(table) && table.scalar_type() == at::kFloat &&
                          table.size(0) <= kMostRows && tokens.dim() > 0;
  return has_kernel && needs_gradient({table}) ? Embedding::apply(table, tokens)
                                               : embedding_reference(table, tokens);
}

at::Tensor chosen_rows(const at::Tensor& table, const at::Tensor& tokens) {
  if (!table.is_cuda() || !has_fast_kernel(table)) return at::embedding(table, tokens);
  static const auto op = registered<decltype(chosen_rows)>("megalodon::chosen_rows");
  return op.call(table, tokens);
}

at::Tensor token_sums(const at::Tensor& x, const at::Tensor& tokens, int64_t V) {
  const int64_t columns = V + (-V & 7);  // in rows at multiples of 16 bytes
  const auto ones = at::zeros({x.size(0), columns}, x.options()).scatter_(1, tokens.reshape({-1, 1}), 1);
  return product(ones.t(), x, statistics_type(x)).narrow(0, 0, V);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("chosen_rows(Tensor table, Tensor tokens) -> Tensor");
  m.def("embedding_backward(Tensor dy, Tensor tokens, int V) -> Tensor");
}

}  // namespace megalodon::ops
