"""What a bundle's TensorRT engines take of a device's memory, from its graphs alone: nothing is built.

Every figure is an estimate from above. They were fitted to TensorRT-RTX 1.7's own builder on a machine
without a GPU (its log's "Total Weights Memory" and "Total Activation Memory", and its peak resident set);
TensorRT on a board was not measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from vlm_edge.errors import MemoryShort, SettingError
from vlm_edge.export.lowering import trt10
from vlm_edge.export.lowering.half import WIDE
from vlm_edge.runtime.manifest import EngineEntry, Manifest, TensorSpec
from vlm_edge.runtime.plans import PlanProfile

GB = 1_000_000_000
# The process: a CUDA context with the kernels that are loaded takes about 300 MB (PyTorch's maintainers,
# pytorch/pytorch#107667), Python with our runtime 45 MB, TensorRT's libraries the rest.
OVERHEAD = 450_000_000
# Of each engine: its compiled kernels (3 to 25 MB in plans of 4 to 540 MB of weights), and what matrix
# products take for themselves (8.7 MB in an engine whose values take 0.4).
KERNELS, SCRATCH = 25_000_000, 10_000_000
# While building: the process and its compiler, and the copies of the weights that it holds at once. Peaks
# of twelve builds lay between 0.61 and 0.98 of this. Users of TensorRT Edge-LLM report 3 to 4 times the
# parameters (NVIDIA/TensorRT-Edge-LLM#30).
BUILD_BASE, BUILD_COPIES = 500_000_000, 3
# A float32 plan unpacks INT8 weights that are not multiplied as INT8: 515 MB of activations and 209 MB of
# weights beside the 142 MB of a model with 134 million.
UNPACKED_FLOAT32 = 1.5

LAYER_PRODUCTS = 7  # of a layer: query, key, value and their output; gate, up, down

# What a board leaves an application, in GB: system, display and what the driver keeps are taken off.
BOARDS = {
    "orin-nano-4gb": 2.5,
    "orin-nano-8gb": 6.0,
    "orin-nx-8gb": 6.0,
    "orin-nx-16gb": 13.0,
    "agx-orin-32gb": 28.0,
    "agx-orin-64gb": 58.0,
    "thor-t4000-64gb": 58.0,
    "agx-thor-128gb": 118.0,
}

# What onnx-ir calls an axis without a name (T5's distances, a Q-Former's queries with the question): it is
# taken for the longest one that the engine's inputs name.
UNNAMED = "None"
_BYTES = {"float32": 4, "int8": 1, "int64": 8, "bool": 1}


@dataclass(frozen=True)
class EngineMemory:
    """One engine, bytes.

    Attributes:
        weights: in its plan, those that a prefill and a decode profile keep twice counted twice.
        activations: what a call needs beside them.
        building: peak of the process that builds it.
    """

    name: str
    weights: int
    activations: int
    building: int


@dataclass(frozen=True)
class Memory:
    """A bundle on a device, bytes.

    Attributes:
        cache: keys and values of a conversation of the profile's capacity, those of pictures and of an
            encoder-decoder's prompt among them.
        overhead: of CUDA, the process and the engines' kernels.
    """

    engines: tuple[EngineMemory, ...]
    cache: int
    overhead: int

    @property
    def running(self) -> int:
        """All engines loaded at once."""
        return sum(size for _, size in self.terms())

    @property
    def building(self) -> int:
        """Of the engine that needs most: they are built one after another."""
        return max(engine.building for engine in self.engines)

    def terms(self) -> list[tuple[str, int]]:
        """What running takes, the largest first."""
        found = [("keys and values", self.cache), ("CUDA and the process", self.overhead)]
        for engine in self.engines:
            found.append((f"weights of {engine.name}", engine.weights))
            found.append((f"activations of {engine.name}", engine.activations))
        return sorted(found, key=lambda term: -term[1])


def estimate(
    folder: Path, manifest: Manifest, profile: PlanProfile, unpacked: bool = False
) -> Memory:
    """What the engines of a bundle take.

    Args:
        folder: the bundle's, of which only graphs are read.
        unpacked: does this TensorRT hold a language model's INT8 weights as floats (`lowering.trt10`)?
    """
    dims = _dimensions(profile)
    engines, caches = [], Counter[str]()
    for name, entry in manifest.engines.items():
        graph = ir.load(folder / entry.graph).graph
        if unpacked:
            _unpack(graph)
        engines.append(_engine(name, graph, profile, dims, _file_size(manifest, entry)))
        for spec in entry.inputs:
            if _is_cache(spec.name):
                caches[spec.name] = _spec_bytes(spec, profile, dims)
    return Memory(tuple(engines), sum(caches.values()), OVERHEAD + KERNELS * len(engines))


def budget(board: str) -> int:
    """Bytes that an application can use on a board.

    Raises:
        SettingError: a board that is not in the table.
    """
    if board not in BOARDS:
        raise SettingError(f"--board {board}; known are {', '.join(BOARDS)}")
    return int(BOARDS[board] * GB)


def check(memory: Memory, free: int, where: str, here: bool = True) -> None:
    """Refuse before anything is built.

    Args:
        free: bytes that can be used.
        where: whose they are, "orin-nano-8gb" or "this machine".
        here: will it run there too, or is it built for another?

    Raises:
        MemoryShort: building or running takes more; the sentence names the largest part and a way out.
    """
    largest = max(memory.engines, key=lambda engine: engine.building)
    if here and memory.running > free:
        term, size = memory.terms()[0]
        raise MemoryShort(
            "running the engines", memory.running, free, where, term, size, _advice(term)
        )
    if largest.building > free:
        term = f"weights of {largest.name}"
        advice = _advice(term)
        raise MemoryShort(
            f"building {largest.name}", largest.building, free, where, term, largest.weights, advice
        )


def _advice(term: str) -> str:
    if term == "keys and values":
        return "lower --capacity"
    if term.startswith("activations"):
        return "lower --chunk or --tiles"
    if term.startswith("weights"):
        return "export with --int8 or --int4, or take a smaller model"
    return "close other programs, or take a board with more memory"


def _engine(
    name: str, graph: ir.Graph, profile: PlanProfile, dims: dict[str, int], file: int
) -> EngineMemory:
    weights = _weights(graph, profile)
    axes = [str(d) for value in graph.inputs if value.shape for d in value.shape]
    if "tokens" in axes:  # media_kv reads a picture's tiles in one row
        dims = {**dims, "tiles": 1}
    dims = {**dims, UNNAMED: max(dims.get(axis, 1) for axis in axes)}
    activations = SCRATCH + peak_activations(graph, profile, dims) + _unpacked(graph, profile)
    if profile.float_type == "float32":
        weights += int((UNPACKED_FLOAT32 - 1) * _unpacked(graph, profile))
    building = BUILD_BASE + file + BUILD_COPIES * weights + activations
    return EngineMemory(name, weights, activations, building)


def _weights(graph: ir.Graph, profile: PlanProfile) -> int:
    """Bytes of a plan's weights.

    A language model's prefill and decode profiles each keep the float weights of products over the
    sequence in a layout of their own (not INT8's and INT4's): 481 MB where one profile takes 269.
    """
    total = 0
    for value in graph.initializers.values():
        size = _tensor_bytes(value, profile)
        twice = value.dtype == ir.DataType.FLOAT and any(
            node.op_type == "MatMul" and _has(node.outputs[0], "sequence")
            for node in value.consumers()
        )
        total += 2 * size if twice else size
    return total


def _unpacked(graph: ir.Graph, profile: PlanProfile) -> int:
    """Bytes of quantized weights that are unpacked for a product of floats: in float16 those of about one
    layer at a time, the head among them, in float32 all of INT8."""
    found = [node for node in graph if node.op_type == "DequantizeLinear" and _weight_only(node)]
    sizes = {n: prod(_shape(n.outputs[0], {})) * _float_bytes(profile) for n in found}
    layer = sum(sorted(sizes.values())[-LAYER_PRODUCTS:])
    if profile.float_type == "float16":
        return layer
    return max(
        layer, sum(size for node, size in sizes.items() if _stored(node) == ir.DataType.INT8)
    )


def _stored(node: ir.Node) -> ir.DataType | None:
    """The type of the numbers that a node unpacks."""
    return None if node.inputs[0] is None else node.inputs[0].dtype


def _unpack(graph: ir.Graph) -> None:
    """Count INT8 weights whose other factor is no INT8 as the floats that `trt10.lower` makes of them."""
    for node in [node for node in graph if trt10.weight_only(node)]:
        weight = node.inputs[0]
        assert weight is not None
        weight.type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def _weight_only(node: ir.Node) -> bool:
    """Does this unpack a weight whose other factor is a float?"""
    weight, product = node.inputs[0], next(iter(node.outputs[0].consumers()), None)
    if (
        weight is None
        or weight.producer() is not None
        or product is None
        or product.op_type != "MatMul"
    ):
        return False
    assert product.inputs[0] is not None
    other = product.inputs[0].producer()
    return other is None or other.op_type != "DequantizeLinear"


def peak_activations(graph: ir.Graph, profile: PlanProfile, dims: dict[str, int]) -> int:
    """Bytes of all values that live at once, at the worst moment of a call in the graph's order.

    Caches are left out. Attention counts its scores twice, before and after the softmax, as where no fused
    kernel fits; values that an engine would fuse away count too.
    """
    last = {value: index for index, node in enumerate(graph) for value in node.inputs if value}
    outputs = set(graph.outputs)
    constants = set(graph.initializers.values())

    def size(value: ir.Value) -> int:
        if value in constants or _is_cache(value.name or ""):
            return 0
        return prod(_shape(value, dims)) * _value_bytes(value, profile)

    live = {value: size(value) for value in graph.inputs}
    now = peak = sum(live.values())
    for index, node in enumerate(graph):
        if all(value is None or value in constants for value in node.inputs):
            constants.update(node.outputs)  # folded
            continue
        for value in node.outputs:
            live[value] = size(value)
            now += live[value]
        peak = max(peak, now + _scores(node, profile, dims))
        for each in {*node.inputs, *node.outputs}:
            if each in live and each not in outputs and last.get(each, index) <= index:
                now -= live.pop(each)
    return peak


def _scores(node: ir.Node, profile: PlanProfile, dims: dict[str, int]) -> int:
    if node.op_type != "Attention":
        return 0
    query, keys = node.inputs[0], node.inputs[1]
    assert query is not None and keys is not None
    q, k = _shape(query, dims), _shape(keys, dims)
    heads = q[1] if len(q) == 4 else node.attributes["q_num_heads"].as_int()
    return 2 * q[0] * heads * q[-2] * k[-2] * _float_bytes(profile)


def _dimensions(profile: PlanProfile) -> dict[str, int]:
    """Symbolic axes at their longest."""
    return {
        "batch": 1,
        "asked": 1,
        "tiles": profile.tiles,
        "sequence": profile.chunk,
        "capacity": profile.capacity,
        "source": profile.capacity,
        "instruction": max(profile.words, 1),
        "media": max(profile.media, 1),
        "tokens": max(profile.media, 1),
    }


def _shape(value: ir.Value, dims: dict[str, int]) -> list[int]:
    """Sizes of its axes."""
    shape = () if value.shape is None else value.shape
    return [d if isinstance(d, int) else dims[str(d.value)] for d in shape]


def _has(value: ir.Value, axis: str) -> bool:
    return value.shape is not None and axis in {str(d) for d in value.shape}


def _float_bytes(profile: PlanProfile) -> int:
    return 2 if profile.float_type == "float16" else 4


def _value_bytes(value: ir.Value, profile: PlanProfile) -> int:
    if value.dtype in (None, ir.DataType.FLOAT):
        return _float_bytes(profile)
    assert value.dtype is not None
    return max(1, int(value.dtype.itemsize))


def _tensor_bytes(value: ir.Value, profile: PlanProfile) -> int:
    count = prod(_shape(value, {}))
    if value.dtype == ir.DataType.FLOAT:
        return count * (4 if WIDE in (value.name or "") else _float_bytes(profile))
    return int(count * value.dtype.itemsize) if value.dtype is not None else 0


def _is_cache(name: str) -> bool:
    return name.startswith(("past.", "present.", "cross.", "media.key", "media.value"))


def _spec_bytes(spec: TensorSpec, profile: PlanProfile, dims: dict[str, int]) -> int:
    axes = [dims.get(d, 1) if isinstance(d, str) else d for d in spec.shape]
    half = spec.dtype == "float32" and profile.float_type == "float16"
    return prod(axes) * (2 if half else _BYTES[spec.dtype])


def _file_size(manifest: Manifest, entry: EngineEntry) -> int:
    """Bytes of the weights' file, which the builder maps while it reads the graph."""
    name = f"{entry.graph.removesuffix('.onnx')}.data"
    return manifest.files[name].size if name in manifest.files else 0
