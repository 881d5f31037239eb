// LinearInt8 and LinearInt4 for ONNX Runtime: checks when the session is made, then linear().

#include "linear_op.h"

#include <stdexcept>
#include <string>

namespace vlm_edge {
namespace {

std::string text(const Dims& dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

void require(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

}  // namespace

template <WeightFormat kFormat>
const std::vector<Operand> LinearKernel<kFormat>::kInputs = {
    {kFloat}, {kFormat == WeightFormat::kInt8 ? kInt8 : kUint8}, {kFloat}, {kFloat, kOptional}};

template <WeightFormat kFormat>
const std::vector<Operand> LinearKernel<kFormat>::kOutputs = {{kFloat}};

template <WeightFormat kFormat>
void LinearKernel<kFormat>::infer(const Shapes& shapes) {
  Shape out = shapes.input(0);
  const Shape scale = shapes.input(2);
  if (out.dims.empty() || scale.dims.empty()) return;
  for (size_t i = 0; i + 1 < out.dims.size(); ++i) {
    if (out.dims[i] < 0 && out.names[i].empty()) return;  // a shape without a name cannot be said
  }
  out.dims.back() = scale.dims.back();
  out.names.back() = scale.names.back();
  shapes.output(0, kFloat, out);
}

template <WeightFormat kFormat>
LinearKernel<kFormat>::LinearKernel(const Node& node) {
  const Tensor weight = node.constant(1), scale = node.constant(2), bias = node.constant(3);
  require(!weight.dims.empty() && !scale.dims.empty(), "weight and scale must be initializers");
  require(weight.dims.size() == 2, "weight must have 2 dimensions, and has the shape " + text(weight.dims));
  const int64_t k = weight.dims[0], n = scale.dims.back();
  const std::string shapes = "weight " + text(weight.dims) + " and scale " + text(scale.dims);
  if (kFormat == WeightFormat::kInt4) {
    require(n % 2 == 0, "the number of columns must be even, two in a byte of the weight, and is " +
                            std::to_string(n));
  }
  require(weight.dims[1] == (kFormat == WeightFormat::kInt8 ? n : n / 2),
          shapes + " differ in the number of columns");
  size_t block = 0;
  if (scale.dims.size() == 2) {
    require(scale.dims[0] > 0 && k % scale.dims[0] == 0,
            "the rows of scale must divide those of the weight, but the shapes are " + shapes);
    block = size_t(k / scale.dims[0]);
    require(block <= Blocks::kLongest, "a block of more than 65536 rows is not supported");
  } else {
    require(scale.dims.size() == 1, "scale must be [N] or [K / block, N], and is " + text(scale.dims));
  }
  require(!node.has(3) || (bias.dims.size() == 1 && bias.dims[0] == n),
          "bias must be an initializer [" + std::to_string(n) + "], and is " + text(bias.dims));
  layer_ = {kFormat,           size_t(k), size_t(n), weight.as<uint8_t>(), scale.as<float>(),
            bias.as<float>(), block};
}

template <WeightFormat kFormat>
void LinearKernel<kFormat>::compute(const Call& call) const {
  const Tensor x = call.input(0);
  require(!x.dims.empty() && size_t(x.dims.back()) == layer_.k,
          "x must be [..., " + std::to_string(layer_.k) + "], and is " + text(x.dims));
  size_t rows = 1;
  for (size_t i = 0; i + 1 < x.dims.size(); ++i) rows *= size_t(x.dims[i]);
  Dims out = x.dims;
  out.back() = int64_t(layer_.n);
  linear(layer_, rows, x.as<float>(), call.output<float>(0, out), call.parallel_for());
}

template class LinearKernel<WeightFormat::kInt8>;
template class LinearKernel<WeightFormat::kInt4>;

}  // namespace vlm_edge
