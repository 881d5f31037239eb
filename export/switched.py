"""A part's graph in which every linear layer can be switched between full precision and quantized.

An `If` around each product runs one branch only, so a layer that is switched off costs nothing, and
one that is on runs just as the quantizer would write it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.calibration.sensitivity import SHAPE, SWITCH
from vlm_edge.export import graphs
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.lowering import cpu
from vlm_edge.export.quantizers import Float, Quantizer


@dataclass
class Switched:
    """Both products of every layer behind a switch.

    Attributes:
        weights: [out, in] of every layer, by path.
        switches: the graph inputs, bool [].
        shapes: the graph outputs, int64 [rank of the layer's input].
        outputs: each layer's product.
    """

    quantizer: Quantizer
    weights: dict[str, TensorRef] = field(default_factory=dict)
    switches: list[ir.Value] = field(default_factory=list)
    shapes: list[ir.Value] = field(default_factory=list)
    outputs: dict[str, ir.Value] = field(default_factory=dict)

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        self.weights[path] = weight
        return _SwitchedProduct(self, path, weight)

    def has_bias(self, path: str) -> bool:
        """Is a constant added to the layer's product?"""
        readers = [use.node for use in self.outputs[path].uses()]
        return any(
            node.op_type == "Add"
            and any(value is not None and value.is_initializer() for value in node.inputs)
            for node in readers
        )


class _SwitchedProduct(nn.Module):
    def __init__(self, owner: Switched, path: str, weight: TensorRef) -> None:
        super().__init__("")
        self._owner, self._path = owner, path
        self.exact = Float().product(path, weight)
        self.quantized = owner.quantizer.product(path, weight)
        for parameter in self.quantized.parameters():  # both have a `weight`
            parameter.name = f"quantized.{parameter.name}"

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        path, owner = self._path, self._owner
        switch = ir.Value(
            name=SWITCH + path, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
        )
        shape = op.Shape(x)
        shape.name, shape.type = SHAPE + path, ir.TensorType(ir.DataType.INT64)
        owner.switches.append(switch)
        owner.shapes.append(shape)

        def branch(product: nn.Module, name: str) -> ir.Graph:
            result = ir.Value(name=f"{path}.{name}")
            graph: ir.Graph = op.builder.subgraph(
                lambda inner: product(inner, x), [], [result], name=f"{path}.{name}"
            )
            for parameter in product.parameters():  # where the engine's fusions look for weights
                del op.builder.root.graph.initializers[parameter.name]
                graph.register_initializer(parameter)
            cpu.shift_activations(graph)
            return graph

        owner.outputs[path] = op.If(
            switch,
            then_branch=branch(self.quantized, "quantized"),
            else_branch=branch(self.exact, "exact"),
        )
        return owner.outputs[path]


def write(build: Callable[[Quantizer], ir.Model], quantizer: Quantizer, path: Path) -> Switched:
    """Write to `path` what `build` makes, with both forms of every layer; for the CPU.

    The graph has the part's own inputs and outputs, a bool input `switch.<layer>` for each layer
    (true is quantized) and an int64 output `shape.<layer>`, the shape of the layer's input.
    """
    switched = Switched(quantizer)
    model = build(switched)
    model.graph.inputs.extend(switched.switches)
    model.graph.outputs.extend(switched.shapes)
    graphs.save(model, path)
    return switched
