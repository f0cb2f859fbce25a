#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "model/parameters.h"
#include "ops/float8/float8.h"

// The three products of a linear layer, y = x W^T and those of both gradients, in the type of x, or in float8
// where the weight asks for it and the sizes suit: x and W as e4m3, dy as e5m2, each with the scale of its
// largest magnitude. None is differentiable.
namespace megalodon::model {

// [R, in] of x [..., in], or [K, R, in] for the weights [K, out, in] of K models.
at::Tensor rows_of(const at::Tensor& x, const at::Tensor& weight);

// The shape of x with so many features.
std::vector<int64_t> shape_with(const at::Tensor& x, int64_t features);

// x [..., in] or a gradient [..., out], as products take it. What it is in float8 is made once, when first
// asked for.
class Operand {
 public:
  // A gradient is needed both ways round, what a layer reads one at a time.
  enum class Part { input, input_again, gradient };

  Operand(const at::Tensor& x, Part part) : x_(x), part_(part) {}
  at::Tensor rows(const at::Tensor& weight) const { return rows_of(x_, weight); }
  const ops::Float8& float8();

 private:
  at::Tensor x_;
  Part part_;
  std::optional<ops::Float8> float8_;
};

// What a backward pass has a weight from: its cast, where the model keeps that, or where it is small, since a
// GPU takes longer to begin a cast than to do it; the weight itself otherwise. In float8 its transpose.
struct SavedWeight {
  at::Tensor value, scale;  // the scale of float8
};

// y [rows, out] = x W^T + bias + added.
at::Tensor linear(Operand& x, const Weight& weight, const Weight& bias = {},
                  const std::optional<at::Tensor>& added = {}, SavedWeight* saved = nullptr);
// dx += dy W, or dx = dy W where dx is undefined; in `type`.
void add_input_gradient(at::Tensor& dx, Operand& dy, const SavedWeight& weight, at::ScalarType type);
// dy^T x in `type`.
at::Tensor weight_gradient(Operand& dy, Operand& x, const SavedWeight& weight, at::ScalarType type);

}  // namespace megalodon::model
