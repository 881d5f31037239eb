"""For TensorRT: a cache of fixed capacity, float16 where asked, INT8 weights of language models in the form
that it multiplies as they are; and the profiles.

TensorRT reads everything else of the portable graph as it is (`tests/test_tensorrt_rtx.py`). Attention in
float32 has no fused kernel there: whoever builds an engine marks it as decomposable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from vlm_edge.errors import EngineFailure
from vlm_edge.export.lowering import rewrite
from vlm_edge.export.lowering.half import half
from vlm_edge.runtime.manifest import TensorSpec
from vlm_edge.runtime.plans import PlanProfile

ARRANGEMENT = "aspect_ratio_id"  # as export/parts.py, which needs all that exporting does
CAPACITY = "capacity"  # the axis of the caches and masks that TensorScatter wants to be a number
Span = tuple[int, int, int]  # an axis's shortest, usual and longest size
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # by input name
ONE: Span = (1, 1, 1)
TYPICAL = 32  # tokens of a question


def lower(portable: Path, folder: Path, profile: PlanProfile) -> Path:
    """Write the graph that TensorRT builds into `folder`, over the same weights: their file is linked
    there, because a graph may only name files beside it.

    Raises:
        EngineFailure: a weight or a cache that TensorRT has no form for.
    """
    model = ir.load(portable)
    _refuse_odd_int4(model.graph, portable.stem)
    if any(value.dtype == ir.DataType.INT8 for value in model.graph.inputs):
        reason = "TensorRT has no int8 cache (TensorScatter); export with --kv-cache float32"
        raise EngineFailure(portable.stem, reason)
    freeze_capacity(model.graph, profile.capacity)
    one_scale_a_weight(model.graph, folder / f"{portable.stem}.joined.data")
    if profile.float_type == "float16":
        half(model)
    path = folder / portable.name
    ir.save(model, path)
    link(portable.with_suffix(".data"), folder)
    return path


def link(weights: Path, folder: Path) -> None:
    """`weights`, if there are any, under their name in `folder` without a copy. Not a second name of the
    file: whoever else reads the bundle meanwhile might take that for an attack, as onnx does."""
    target = folder / weights.name
    if weights.is_file() and not target.exists():
        target.symlink_to(weights.resolve())


def profiles(
    inputs: Sequence[TensorSpec], profile: PlanProfile, picture: int = 1
) -> tuple[Profile, ...]:
    """The ranges of input shapes that an engine is built for.

    A language model has two, prefill of 1 to `chunk` positions and decode of one; other parts have
    one, for 1 to `tiles` tiles, an instruction of 1 to `words` tokens or an encoder-decoder's prompt of
    1 to `capacity`.

    Args:
        picture: positions of one picture, where a language model attends to pictures.
    """
    capacity, tiles, words = profile.capacity, profile.tiles, profile.words
    spans: dict[str, Span] = {"batch": ONE, "asked": ONE, CAPACITY: (capacity,) * 3}
    # An encoder that knows how tiles are arranged sees all of them at once; else one at a time is usual.
    together = any(spec.name == ARRANGEMENT for spec in inputs)
    spans["tiles"] = (1, tiles if together else 1, tiles)
    spans["instruction"] = (1, min(TYPICAL, words), words)
    spans["source"] = (1, min(TYPICAL, capacity), capacity)
    spans["media"] = (1, picture, profile.media)
    if any(
        "tokens" in spec.shape for spec in inputs
    ):  # media_kv: one picture at a time, its tiles together
        spans["tiles"], spans["tokens"] = ONE, spans["media"]
    if not any("sequence" in spec.shape for spec in inputs):
        return (_profile(inputs, spans),)
    longest = min(profile.chunk, capacity)
    prefill: Span = (1, longest, longest)
    return tuple(_profile(inputs, {**spans, "sequence": span}) for span in (prefill, ONE))


def _profile(inputs: Sequence[TensorSpec], spans: Mapping[str, Span]) -> Profile:
    def shape(spec: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(spans[d][which] if isinstance(d, str) else d for d in spec.shape)

    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in inputs}


def freeze_capacity(graph: ir.Graph, capacity: int) -> int:
    """Write the capacity into every shape that names it; how many there were."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    frozen = [value for value in values if value.shape is not None and _names(value.shape)]
    for value in frozen:
        assert value.shape is not None
        dims = [capacity if _is_capacity(d) else d for d in value.shape]
        value.shape = ir.Shape(dims)
    return len(frozen)


def _names(shape: ir.Shape) -> bool:
    return any(_is_capacity(dimension) for dimension in shape)


def _is_capacity(dimension: int | ir.SymbolicDim) -> bool:
    return isinstance(dimension, ir.SymbolicDim) and dimension.value == CAPACITY


def one_scale_a_weight(graph: ir.Graph, joined: Path) -> int:
    """INT8 weights with one scale a column: one scale for the whole weight before the product, the columns'
    own, relative to it, behind; how many.

    TensorRT-RTX 1.7 reads a weight of this form inside the product. Any other INT8 weight it unpacks into
    memory first, in every call, which takes longer than reading float16 would (`blockwise`). It would also
    make one product of those that read the same input, and their scales a vector again, so they are one
    here.

    Args:
        joined: file for the weights of such products.
    """
    found = [node for node in graph if _one_block(node)]
    groups: dict[ir.Value | None, list[ir.Node]] = {}
    for node in found:
        groups.setdefault(_product(node).inputs[0], []).append(node)
    with joined.open("wb") as file:
        for nodes in groups.values():
            _one_product(graph, nodes, file)
    if not joined.stat().st_size:
        joined.unlink()
    return len(found)


def _one_product(graph: ir.Graph, nodes: list[ir.Node], file: BinaryIO) -> None:
    """One product in place of all that multiply their common input with what `nodes` dequantize."""
    products, columns = [_product(node) for node in nodes], [_columns(node) for node in nodes]
    whole, relative = _relative(columns)
    name, source, weight = products[0].name, products[0].inputs[0], nodes[0].inputs[0]
    if len(nodes) > 1:
        weight = _joined(graph, f"{name}/weight", [node.inputs[0] for node in nodes], file)
    scale = _constant(graph, f"{name}/scale", whole)
    floats = ir.node("DequantizeLinear", [weight, scale], name=f"{name}/Dequantize")
    product = ir.node("MatMul", [source, floats.outputs[0]], name=name)
    factors = _constant(graph, f"{name}/columns", relative)
    scaled = ir.node("Mul", [product.outputs[0], factors], name=f"{name}/Mul")
    added, outputs = [floats, product, scaled], scaled.outputs
    if len(nodes) > 1:
        sizes = _constant(graph, f"{name}/sizes", np.array([len(scales) for scales in columns]))
        split = ir.node(
            "Split", [scaled.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes),
            name=f"{name}/Split",
        )  # fmt: skip
        added, outputs = [*added, split], split.outputs
    for node in added:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    reading = set(products)
    graph.insert_before(next(node for node in graph if node in reading), added)
    for node, old, new in zip(nodes, products, outputs, strict=True):
        rewrite.take_over(old.outputs[0], new)
        scales = node.inputs[1]
        graph.remove([old, node], safe=True)
        if scales is not None and not scales.uses():
            del graph.initializers[str(scales.name)]


def _relative(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The largest scale, float32 [], and all over it, [out]."""
    every = np.concatenate(columns)
    return np.asarray(every.max(), np.float32), every / every.max()


def _joined(
    graph: ir.Graph, name: str, weights: Sequence[ir.Value | None], file: BinaryIO
) -> ir.Value:
    """Weights [in, out] side by side, at the end of `file`; the graph forgets them."""
    arrays = []
    for weight in weights:
        assert weight is not None and weight.const_value is not None
        arrays.append(rewrite.values(weight.const_value))
    offset, both = file.tell(), np.concatenate(arrays, axis=1)
    file.write(both.tobytes())
    path = Path(file.name)
    tensor = ir.ExternalTensor(
        path.name, offset, both.nbytes, ir.DataType.INT8,
        shape=ir.Shape(both.shape), name=name, base_dir=str(path.parent),
    )  # fmt: skip
    return rewrite.initializer(graph, name, tensor)


def _product(node: ir.Node) -> ir.Node:
    """The one that multiplies with the weight."""
    (product,) = node.outputs[0].consumers()
    return product


def _columns(node: ir.Node) -> np.ndarray:
    """float32 [out], the weight's scales."""
    scales = node.inputs[1]
    assert scales is not None and scales.const_value is not None
    return rewrite.values(scales.const_value)[0]


def _constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    return rewrite.initializer(graph, name, ir.Tensor(values, name=name))


def blockwise(graph: ir.Graph) -> int:
    """INT8 weights with a scale a block, which TensorRT unpacks in every call."""
    return sum(
        node.op_type == "DequantizeLinear"
        and "block_size" in node.attributes
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.INT8
        for node in graph
    )


def _one_block(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or "block_size" not in node.attributes:
        return False
    weight, scales = node.inputs[:2]
    assert weight is not None and scales is not None and scales.shape is not None
    return weight.dtype == ir.DataType.INT8 and scales.shape[0] == 1


def _refuse_odd_int4(graph: ir.Graph, part: str) -> None:
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.INT4 and value.shape is not None:
            rows, columns = value.shape
            if isinstance(rows, int) and isinstance(columns, int) and rows * columns % 2:
                reason = f"TensorRT has no INT4 of {rows} x {columns} values ({name}); export int8"
                raise EngineFailure(part, reason)
