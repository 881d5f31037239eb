"""For ONNX Runtime on an NVIDIA GPU (its CUDA provider): float16 over the same weights.

- Activations are not quantized: Q/DQ is slower than float16 there. The weights stay INT8 in the file.
- Products with INT8 or INT4 weights stay DequantizeLinear and MatMul, of which ONNX Runtime makes
  MatMulNBits while it loads: it folds the Cast of the scales first. A scale that float16 would spoil
  (`half.py`) stays float32; such a product is right, but not fused.
- Attention over a cache is GroupQueryAttention, as on the CPU. It wants the number of positions on the
  host, so a step copies 4 bytes back. Where positions add to the scores (MPT, T5) it stays Attention.
- Normalisations read float16: the provider's kernels sum in float32.
- A language model with an INT8 cache is not lowered: the operator's own quantized cache has one scale for
  all positions.

The provider has a kernel for each of KERNELS, in the types these graphs use; an operator left to the CPU
would copy every step there and back. Read from the registry of onnxruntime-gpu 1.31.1
(`onnxruntime_pybind11_state.get_all_opkernel_def`), not from a run on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from vlm_edge.export.lowering import cpu, rewrite
from vlm_edge.export.lowering.cpu import Windows
from vlm_edge.export.lowering.half import half

KERNELS = {
    "": frozenset(
        """
        Add Attention Cast Clip Concat Conv Cos DequantizeLinear Expand Gather Gelu Greater GreaterOrEqual
        Identity LayerNormalization MatMul Max Mul Or Pad Pow RMSNormalization Range ReduceMax Relu Reshape
        RotaryEmbedding Shape Sigmoid Sin Slice Split Squeeze Sub TensorScatter Transpose Unsqueeze
        """.split()
    ),
    cpu.CONTRIB: frozenset(["GroupQueryAttention"]),  # of float16 alone
}


def lower(portable: Path, windows: Windows | None = None) -> str | None:
    """Write the CUDA graph beside the portable one, sharing its weights.

    Args:
        windows: `runtime.feeds.windows` of a language model.

    Returns:
        The file's name; None for a language model with an INT8 cache.
    """
    model = ir.load(portable)
    if any(value.dtype == ir.DataType.INT8 for value in model.graph.inputs):
        return None
    exact_activations(model)
    cpu.group_queries(model, windows or {})
    half(model, norms=ir.DataType.FLOAT16)
    path = portable.with_name(f"{portable.stem}.cuda.onnx")
    ir.save(model, path)
    return path.name


def exact_activations(model: ir.Model) -> int:
    """Let what read a rounded activation read the activation itself; how many there were."""
    pairs = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    for quantize in pairs:
        x = quantize.inputs[0]
        assert x is not None
        for dequantize in list(quantize.outputs[0].consumers()):
            dequantize.outputs[0].replace_all_uses_with(x)
    if pairs:
        rewrite.clean(model)
    return len(pairs)
