"""For TensorRT: a cache of fixed capacity, float16 where asked, one scale a column instead of one block;
and the profiles.

TensorRT reads everything else of the portable graph as it is (`tests/test_tensorrt_rtx.py`). Attention in
float32 has no fused kernel there: whoever builds an engine marks it as decomposable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from vlm_edge.errors import EngineFailure
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
    columns_for_blocks(model.graph)
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


def columns_for_blocks(graph: ir.Graph) -> int:
    """INT8 weights whose one block is the whole width get a scale a column, which is the same; how
    many. TensorRT-RTX 1.7 fails to compile several blockwise ones that share their input."""
    found = [node for node in graph if _one_block(node)]
    for node in found:
        old = node.inputs[1]
        assert old is not None and old.name is not None and old.const_value is not None
        scales = ir.Tensor(old.const_value.numpy()[0], name=f"{old.name}.columns")
        new = ir.Value(
            name=scales.name,
            shape=scales.shape,
            type=ir.TensorType(scales.dtype),
            const_value=scales,
        )
        graph.register_initializer(new)
        node.replace_input_with(1, new)
        if not old.uses():
            del graph.initializers[old.name]
        del node.attributes["block_size"]
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
    return len(found)


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
