"""Layers joined with their norm, gate and residual; and what keeps a neighbour out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_graphs import FLOAT, Group, constant, open_model, random_layer
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlm_edge.export.lowering import fused
from vlm_edge.runtime import native

K, N = 24, 40
RNG = np.random.default_rng(0)
NORM = RNG.standard_normal(K, dtype=np.float32)
GATE, UP = (random_layer(RNG, 8, K, N, block, bias=False) for block in (None, 8))
DOWN = random_layer(RNG, 8, N, K, None, bias=True)


def feed_forward(residual: tuple[str | int, ...] = ("rows", K), also: str = "") -> ir.Model:
    """x + down(silu(gate(norm(x))) * up(norm(x))); `also` names a value that is read from outside too."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["rows", K]))
    other = ir.Value(name="residual", type=FLOAT, shape=ir.Shape(residual))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def make(kind: str, *inputs: ir.Value, width: int = N, domain: str = "") -> ir.Value:
        out = ir.Value(name=f"v{len(nodes)}", type=FLOAT, shape=ir.Shape(["rows", width]))
        attributes = [ir.AttrFloat32("epsilon", 0.5)] if kind == "RMSNormalization" else []
        nodes.append(ir.Node(domain, kind, inputs, attributes, outputs=[out]))
        return out

    def held(name: str, array: np.ndarray) -> ir.Value:
        initializers.append(constant(name, array))
        return initializers[-1]

    def linear(name: str, layer: object, value: ir.Value, width: int) -> ir.Value:
        parts = {"weight": layer.weight, "scale": layer.scale, "bias": layer.bias}  # type: ignore[attr-defined]
        stored = [held(f"{name}.{part}", a) for part, a in parts.items() if a is not None]
        return make("LinearInt8", value, *stored, width=width, domain="vlm_edge")

    values = {"norm": make("RMSNormalization", x, held("norm", NORM), width=K)}
    values["gate"] = linear("gate", GATE, values["norm"], N)
    opened = make("Mul", values["gate"], make("Sigmoid", values["gate"]))
    up = linear("up", UP, values["norm"], N)
    values["down"] = linear("down", DOWN, make("Mul", up, opened), K)
    outputs = [make("Add", values["down"], other, width=K)]
    outputs += [values[also]] if also else []
    graph = ir.Graph(
        [x, other],
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 23, "vlm_edge": 1},
        name="feed_forward",
    )
    return ir.Model(graph, ir_version=10)


def joined(model: ir.Model) -> list[str]:
    fused.join(model.graph, native.DOMAIN)
    RemoveUnusedNodesPass()(model)
    return [node.op_type for node in model.graph]


def test_a_feed_forward_block_is_two_operators() -> None:
    model = feed_forward()
    assert joined(model) == ["Linears", "Linears"]
    first, second = model.graph
    assert first.attributes.get_string("gate") == "silu"
    assert first.attributes.get_float("epsilon") == 0.5
    assert [value and value.name for value in first.inputs[:3]] == ["x", "norm", None]
    # norm, its bias, factor, residual
    assert [value and value.name for value in second.inputs[1:5]] == [None, None, None, "residual"]


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (feed_forward(also="norm"), ["RMSNormalization", "Linears", "Linears"]),
        (feed_forward(also="gate"), ["Linears", "Sigmoid", "Mul", "Mul", "Linears"]),
        (feed_forward(also="down"), ["Linears", "Linears", "Add"]),
        (feed_forward(residual=(1, K)), ["Linears", "Linears", "Add"]),
    ],
    ids=["norm", "gate", "sum", "shape"],
)
def test_what_is_read_elsewhere_or_broadcast_stays(model: ir.Model, kinds: list[str]) -> None:
    assert sorted(joined(model)) == sorted(kinds)


@pytest.mark.skipif(native.library() is None, reason="our kernels are not here")
def test_the_result_is_that_of_the_parts() -> None:
    model = feed_forward()
    joined(model)
    x, residual = np.random.default_rng(1).standard_normal((2, 5, K), dtype=np.float32)
    (found,) = open_model(model).run(None, {"x": x, "residual": residual})
    (inner,) = Group([GATE, UP], NORM, 0.5, "silu").expected(x)
    (expected,) = Group([DOWN], adds=True).expected(inner, residual)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()  # one step of int8


@pytest.mark.parametrize(("clips", "count"), [((3.0, 3.0), 1), ((3.0, 0.0), 2)])
def test_layers_share_an_operator_if_they_clip_their_input_alike(
    clips: tuple[float, float], count: int
) -> None:
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["rows", K]))
    initializers: list[ir.Value] = []
    nodes = []
    for i, (layer, clip) in enumerate(zip((GATE, UP), clips, strict=True)):
        initializers += [constant(f"w{i}", layer.weight), constant(f"s{i}", layer.scale)]
        out = ir.Value(name=f"y{i}", type=FLOAT, shape=ir.Shape(["rows", N]))
        attributes = [ir.AttrFloat32("clip", clip)]
        inputs = [x, *initializers[-2:]]
        nodes.append(ir.Node("vlm_edge", "LinearInt8", inputs, attributes, outputs=[out]))
    graph = ir.Graph(
        [x],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 23, "vlm_edge": 1},
        name="pair",
    )
    model = ir.Model(graph, ir_version=10)
    assert joined(model) == ["Linears"] * count
    kept = [node.attributes.get_float("clip") for node in model.graph]
    assert kept == list(dict.fromkeys(clips))
