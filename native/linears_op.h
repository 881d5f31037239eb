// The operator Linears (domain vlm_edge, version 1): layers that share an input, in one start.
//
//   Linears(x float32 [..., K], norm float32 [K]?, norm_bias float32 [K]?, factor float32 [N]?,
//           residual float32 [..., N]?,
//           weight uint8, scale float32, bias float32 [N]?, up to three times) -> float32 [..., N], ...
//
//   bits: 8 or 4 for each weight. Weights have the bytes of ONNX's tensor [K, N]: [K, N] of int8, or
//         [K, N / 2] with two int4 in a byte. scale is [N] or [K / block, N].
//   epsilon: of the norm. With `norm`, x is RMS-normalised before the layers read it; with `norm_bias`
//            too, it is layer-normalised.
//   clip: magnitude beyond which what the layers read (after the norm) is clipped when a token is
//          rounded; 0: none.
//   activation: "gelu" (exact), "gelu_tanh", "quick_gelu", "relu" or "".
//   gate: "silu": two weights and one output, silu(first) * second. "": an output for each weight.
//
// activation, then factor, then residual follow the product of a single weight. All but x and residual
// are initializers and stay where they lie: in the mapped file. linear.h says what is computed.
#pragma once

#include "linear.h"
#include "op.h"

namespace vlm_edge {

class Linears {
 public:
  static constexpr const char* kName = "Linears";
  static const std::vector<Operand> kInputs, kOutputs;
  static void infer(const Shapes& shapes);

  explicit Linears(const Node& node);
  void compute(const Call& call) const;

 private:
  LinearGroup group_;
  bool adds_;  // a residual
};

}  // namespace vlm_edge
