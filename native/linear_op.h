// The operators LinearInt8 and LinearInt4 (domain vlm_edge, version 1).
//
//   LinearInt8(x float32 [..., K], weight int8 [K, N], scale, bias?) -> float32 [..., N]
//   LinearInt4(x float32 [..., K], weight uint8 [K, N / 2], scale, bias?) -> float32 [..., N]
//
// scale is float32 [N] or [K / block, N], bias float32 [N]. Weight, scale and bias are initializers
// and stay where they lie: in the mapped file. An int4 weight has the bytes of ONNX's INT4 tensor
// [K, N]. linear.h says what is computed.
#pragma once

#include "linear.h"
#include "op.h"

namespace vlm_edge {

template <WeightFormat kFormat>
class LinearKernel {
 public:
  static constexpr const char* kName = kFormat == WeightFormat::kInt8 ? "LinearInt8" : "LinearInt4";
  static const std::vector<Operand> kInputs, kOutputs;
  static void infer(const Shapes& shapes);

  explicit LinearKernel(const Node& node);
  void compute(const Call& call) const;

 private:
  Linear layer_;
};

using LinearInt8 = LinearKernel<WeightFormat::kInt8>;
using LinearInt4 = LinearKernel<WeightFormat::kInt4>;

}  // namespace vlm_edge
