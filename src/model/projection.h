#pragma once
#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "model/parameters.h"
#include "ops/add_rms_norm/add_rms_norm.h"

namespace megalodon::model {

// A linear layer: weight [out, in] and bias [out] or undefined; without a bias also the weights [K, out, in]
// of stacked models, each for its share of the rows. Its result joins `added` [..., out], if there is one.
struct Linear {
  Weight weight, bias = {};
  at::Tensor added = {};
};

// x W^T + b in the type of x, x [..., in]. Weights keep their own type, and so do their gradients; what they
// are cast to for a product is not kept for the backward pass, unless it is small or the model keeps it.
at::Tensor project(const at::Tensor& x, const Weight& weight, const Weight& bias = {});

// The same x through several layers: the gradients of x are summed inside the products. On a GPU, where a
// gradient is wanted and the weights lie together, by one product whose columns the results are.
std::vector<at::Tensor> project(const at::Tensor& x, std::initializer_list<Linear> layers);

// The same results, and last x again: the gradient of what is made from that is summed inside the products
// too.
std::vector<at::Tensor> project_and_pass(const at::Tensor& x, std::initializer_list<Linear> layers);

// What project_swiglu() (model/gated_projection.h) makes its result of: two projections of x, and silu(a) b
// without a gradient where one product on a GPU gives all three.
struct SwigluInputs {
  at::Tensor a, b;         // [..., F]; undefined beside `hidden` where no gradient is wanted
  at::Tensor hidden = {};  // or undefined
};
SwigluInputs project_for_swiglu(const at::Tensor& x, const Weight& a, const Weight& b);

// A product input W^T whose numbers are left to the norm behind it.
struct LeftProduct {
  at::Tensor input, weight = {};  // [..., in], [out, in]; undefined: there is none
  bool defined() const { return input.defined(); }
  // Has that product's shape and a place for its gradient.
  at::Tensor placeholder() const;
};
// What joins a residual stream.
struct Addend {
  at::Tensor value;
  LeftProduct product = {};  // where it is defined, `value` is its placeholder
};

// Rows of a table [V, D] that tokens [...] choose.
struct Lookup {
  at::Tensor table, tokens;
};

// A residual stream that takes up what a block adds and is normalised: ops::add_rms_norm().
struct NormInput {
  at::Tensor x;
  std::optional<Addend> added;
  at::Tensor factor;
  double eps;
  at::ScalarType type;                // of what is projected
  std::optional<Lookup> lookup = {};  // where x is that, and nothing is added
};
ops::AddRmsNorm norm(const NormInput& input);
// The product x W^T, left where a GPU has a kernel for it with the norm behind: norm(), or where there are
// layers behind that, norm_and_project() of these.
LeftProduct leave_to_norm(const at::Tensor& x, const Weight& weight, std::initializer_list<Linear> behind);
// What such a product adds.
Addend project_for_norm(const at::Tensor& x, const Weight& weight, std::initializer_list<Linear> behind);
// Its sum, and the normalised rows through several layers or two for SwiGLU, as above. Where a GPU's product
// has a kernel for that, the norm's gradient is made where the product's gradient of the rows is. Of tokens
// from a table of few rows a GPU projects these rows, and the tokens choose among the results.
struct NormProjections {
  at::Tensor sum;
  std::vector<at::Tensor> results;
};
NormProjections norm_and_project(const NormInput& input, std::initializer_list<Linear> layers);
struct NormSwigluInputs {
  at::Tensor sum;
  SwigluInputs inputs;
};
NormSwigluInputs norm_and_project_for_swiglu(const NormInput& input, const Weight& a, const Weight& b);

}  // namespace megalodon::model
