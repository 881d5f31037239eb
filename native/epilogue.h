// What follows the product of a linear layer while it is still in the cache.
#pragma once

#include <cstddef>

namespace vlm_edge {

enum class Activation { kNone, kGelu, kGeluTanh, kQuickGelu, kRelu };

struct Matrix {
  float* data;
  size_t stride;  // values from row to row
};

// y = activation(product) * factor + residual, the last two if they are not null.
struct Epilogue {
  Activation activation = Activation::kNone;
  const float* factor = nullptr;    // [n], from the first column
  const float* residual = nullptr;  // from the first value, with the stride of y

  bool empty() const { return activation == Activation::kNone && !factor && !residual; }
};

// y may be the product itself.
void finish(const Epilogue& epilogue, size_t rows, size_t columns, const float* product, size_t stride, Matrix y);

// y = silu(y) * other.
void gate(size_t rows, size_t columns, Matrix y, const float* other, size_t stride);

}  // namespace vlm_edge
