"""For ONNX Runtime on a CPU: signed activations become unsigned ones, which its INT8 kernels want.

The portable graph quantizes activations to int8 with zero-point 0 (TensorRT's form). int8 q and uint8
q + 128 with zero-point 128 stand for the same values, so nothing changes but the kernel that is used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

ZERO = "zero_point_128"


def lower(portable: Path) -> str | None:
    """Write the CPU graph beside the portable one, sharing its weights.

    Returns:
        The file's name; None where the portable graph quantizes no activation and is run as it is.
    """
    model = ir.load(portable)
    if not shift_activations(model.graph):
        return None
    path = portable.with_name(f"{portable.stem}.cpu.onnx")
    ir.save(model, path)
    return path.name


def shift_activations(graph: ir.Graph) -> int:
    """Give every int8 activation Q/DQ pair of `graph` the zero-point 128; how many pairs there were."""
    pairs = [node for node in graph if node.op_type == "QuantizeLinear"]
    if not pairs:
        return 0
    tensor = ir.Tensor(np.array(128, np.uint8), name=ZERO)
    zero = ir.Value(
        name=ZERO, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.UINT8), const_value=tensor
    )
    graph.register_initializer(zero)
    for quantize in pairs:
        old = quantize.inputs[2]
        quantize.replace_input_with(2, zero)
        quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        for dequantize in list(quantize.outputs[0].consumers()):
            dequantize.replace_input_with(2, zero)
        if old is not None and (producer := old.producer()) is not None and not old.uses():
            graph.remove(producer)
    return len(pairs)
