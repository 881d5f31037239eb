// Linears for ONNX Runtime: checks when the session is made, then linears().

#include "linears_op.h"

#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

namespace vlm_edge {
namespace {

constexpr size_t kNorm = 1, kNormBias = 2, kFactor = 3, kResidual = 4, kFirstWeight = 5;  // inputs
constexpr size_t kMost = 3;  // weights

Activation activation_of(const std::string& name) {
  const char* const names[] = {"", "gelu", "gelu_tanh", "quick_gelu", "relu"};  // as the enumeration
  for (size_t i = 0; i < std::size(names); ++i)
    if (name == names[i]) return Activation(i);
  throw std::invalid_argument(
      "activation must be \"gelu\", \"gelu_tanh\", \"quick_gelu\", \"relu\" or empty, and is \"" + name + "\"");
}

Linear read_layer(const Node& node, size_t first, int64_t bits) {
  require(bits == 8 || bits == 4, "bits must be 8 or 4 for each weight, and has " + std::to_string(bits));
  const Tensor weight = node.constant(first), scale = node.constant(first + 1), bias = node.constant(first + 2);
  require(!weight.dims.empty() && !scale.dims.empty(), "weight and scale must be initializers");
  require(weight.dims.size() == 2, "weight must have 2 dimensions, and has the shape " + text(weight.dims));
  const int64_t k = weight.dims[0], n = scale.dims.back();
  const std::string shapes = "weight " + text(weight.dims) + " and scale " + text(scale.dims);
  require(k > 0 && n > 0, "a weight must not be empty, but the shapes are " + shapes);
  require(bits == 8 || n % 2 == 0,
          "the number of columns must be even, two in a byte of the weight, and is " + std::to_string(n));
  require(weight.dims[1] == (bits == 8 ? n : n / 2), shapes + " differ in the number of columns");
  size_t block = 0;
  if (scale.dims.size() == 2) {
    require(scale.dims[0] > 0 && k % scale.dims[0] == 0,
            "the rows of scale must divide those of the weight, but the shapes are " + shapes);
    block = size_t(k / scale.dims[0]);
    require(block <= Blocks::kLongest, "a block of more than 65536 rows is not supported");
  } else {
    require(scale.dims.size() == 1, "scale must be [N] or [K / block, N], and is " + text(scale.dims));
  }
  require(!node.has(first + 2) || bias.dims == Dims{n},
          "bias must be an initializer [" + std::to_string(n) + "], and is " + text(bias.dims));
  return {bits == 8 ? WeightFormat::kInt8 : WeightFormat::kInt4, size_t(k), size_t(n),
          weight.as<uint8_t>(), scale.as<float>(), bias.as<float>(), block};
}

}  // namespace

const std::vector<Operand> Linears::kInputs = {
    {kFloat}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional},
    {kUint8}, {kFloat}, {kFloat, kOptional},
    {kUint8, kOptional}, {kFloat, kOptional}, {kFloat, kOptional},
    {kUint8, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}};

const std::vector<Operand> Linears::kOutputs = {{kFloat}, {kFloat, kOptional}, {kFloat, kOptional}};

void Linears::infer(const Shapes& shapes) {
  Shape out = shapes.input(0);
  if (out.dims.empty()) return;
  for (size_t i = 0; i + 1 < out.dims.size(); ++i)
    if (out.dims[i] < 0 && out.names[i].empty()) return;  // a shape without a name cannot be said
  const size_t weights = shapes.has_text("gate") ? 1 : (shapes.inputs() - kFirstWeight + 2) / 3;
  for (size_t i = 0; i < weights; ++i) {
    const Shape scale = shapes.input(kFirstWeight + 3 * i + 1);
    if (scale.dims.empty()) return;
    out.dims.back() = scale.dims.back();
    out.names.back() = scale.names.back();
    shapes.output(i, kFloat, out);
  }
}

Linears::Linears(const Node& node) : adds_(node.has(kResidual)) {
  size_t count = 0;
  while (count < kMost && node.has(kFirstWeight + 3 * count)) ++count;
  const std::vector<int64_t> bits = node.integers("bits");
  require(bits.size() == count, "bits must have a number for each weight, but there are " +
                                    std::to_string(bits.size()) + " for " + std::to_string(count));
  for (size_t i = 0; i < count; ++i) group_.layers.push_back(read_layer(node, kFirstWeight + 3 * i, bits[i]));

  const Linear& first = group_.layers[0];
  for (const Linear& layer : group_.layers)
    require(layer.k == first.k, "weights of one input must have as many rows, but they have " +
                                    std::to_string(first.k) + " and " + std::to_string(layer.k));

  const std::string gate = node.text("gate");
  require(gate.empty() || gate == "silu", "gate must be \"silu\" or empty, and is \"" + gate + "\"");
  group_.gated = !gate.empty();
  require(!group_.gated || count == 2, "a gate takes two weights, and there are " + std::to_string(count));
  require(!group_.gated || first.n == group_.layers[1].n,
          "weights of a gate must have as many columns, but they have " + std::to_string(first.n) + " and " +
              std::to_string(group_.layers.back().n));
  require(!adds_ || count == 1,
          "a residual is added to the output of one weight, but there are " + std::to_string(count));
  require(node.outputs() == group_.outputs(), "there must be " + std::to_string(group_.outputs()) +
                                                  " outputs, and there are " + std::to_string(node.outputs()));

  const auto vector = [&](size_t input, const std::string& name, size_t size) {
    const Tensor values = node.constant(input);
    require(!node.has(input) || values.dims == Dims{int64_t(size)},
            name + " must be an initializer [" + std::to_string(size) + "], and is " + text(values.dims));
    return values.as<float>();
  };
  const float* norm = vector(kNorm, "norm", first.k);
  group_.norm = {norm, vector(kNormBias, "norm_bias", first.k), node.attribute("epsilon", 0.0f)};
  require(norm || !group_.norm.bias, "norm_bias needs norm");
  const float clip = node.attribute("clip", 0.0f);
  require(clip >= 0, "clip must not be negative, and is " + std::to_string(clip));
  group_.clip = clip > 0 ? clip : std::numeric_limits<float>::infinity();
  group_.factor = vector(kFactor, "factor", first.n);
  group_.activation = activation_of(node.text("activation"));
  require(count == 1 || (!group_.factor && group_.activation == Activation::kNone),
          "an activation or a factor follows one weight, and there are " + std::to_string(count));
}

void Linears::compute(const Call& call) const {
  const Tensor x = call.input(0);
  const size_t k = group_.layers[0].k;
  require(!x.dims.empty() && size_t(x.dims.back()) == k,
          "x must be [..., " + std::to_string(k) + "], and is " + text(x.dims));
  size_t rows = 1;
  for (size_t i = 0; i + 1 < x.dims.size(); ++i) rows *= size_t(x.dims[i]);
  std::vector<float*> y;
  Dims dims = x.dims;
  for (size_t i = 0; i < group_.outputs(); ++i) {
    dims.back() = int64_t(group_.layers[i].n);
    y.push_back(call.output<float>(i, dims));
  }
  const Tensor residual = adds_ ? call.input(kResidual) : Tensor{};
  require(!adds_ || residual.dims == dims,
          "residual must be " + text(dims) + " as the output is, and is " + text(residual.dims));
  linears(group_, rows, x.as<float>(), residual.as<float>(), y, call.parallel_for());
}

}  // namespace vlm_edge
