"""What the TensorRT gate builds: tiny models of every architecture, and how a graph of them is built.

Needs requirements/tensorrt-rtx.txt; a plan cannot be loaded without a GPU, so what became of a graph is
read from the list of layers in the builder's log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir
import pytest

from vlm_edge.export.lowering import tensorrt
from vlm_edge.export.tensorrt.api import BuildSettings, Built, TensorRT
from vlm_edge.export.tensorrt.layers import promised
from vlm_edge.runtime.manifest import TensorSpec
from vlm_edge.runtime.plans import PlanProfile

needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed (requirements/tensorrt-rtx.txt)",
)
TARGETS = ("8.6", "12.0")  # Ampere cards, the desktop relatives of Jetson Orin; Blackwell cards

# By architecture, cases of the tiny checkpoints (families.py).
GATE = {
    # GQA and scaled RoPE; MQA and a width of 40; biases everywhere; a window; dynamic RoPE; tied weights,
    # biases and two masks; MQA tied as the demo model; SwiGLU and joined layers.
    "llava": ("clip-llama-v4", "clip-llama-native", "clip-llama-biases", "clip-mistral-window",
              "clip-padded-square", "siglip-qwen2", "dinov2-llama", "dinov2-swiglu"),
    "llava_next": ("next-clip-mistral",),
    "smolvlm": ("smolvlm", "idefics3-factor3"),
    "blip2": ("blip2-opt", "blip2-opt-projection", "blip2-t5", "blip2-t5-plain"),
    "instructblip": ("instructblip-vicuna",),
    "idefics": ("idefics", "idefics-plain"),  # with a resampler and without
    "open_flamingo": ("llama", "gpt_neox", "mpt", "mpt-clip"),
    "mllama": ("mllama", "mllama-native"),
}  # fmt: skip
CASES = [case for cases in GATE.values() for case in cases]


def profile(**differences: object) -> PlanProfile:
    """Room for a tiny model."""
    sizes = {"float_type": "float16", "capacity": 48, "chunk": 16, "tiles": 3, "words": 20}
    return PlanProfile(**{**sizes, **differences})  # type: ignore[arg-type]  # by name


@dataclass(frozen=True)
class Gate:
    """An engine as the gate built it.

    Attributes:
        graph: the lowered one.
        promised: names of its products of INT8 by INT8.
    """

    graph: Path
    built: Built
    promised: frozenset[str]

    def stores(self, dtype: ir.DataType) -> bool:
        """Has the graph a weight of this type?"""
        values = ir.load(self.graph).graph.initializers.values()
        return any(value.dtype == dtype for value in values)


def build(
    trt: TensorRT,
    portable: Path,
    inputs: Sequence[TensorSpec],
    folder: Path,
    room: PlanProfile,
    picture: int = 1,
    targets: tuple[str, ...] = TARGETS,
) -> Gate:
    """Lower into `folder` and build, one plan for all `targets`.

    Raises:
        BuildFailed: TensorRT refuses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph = tensorrt.lower(portable, folder, room)
    settings = BuildSettings(tensorrt.profiles(inputs, room, picture), targets)
    built = trt.build(portable.stem, graph, settings)
    return Gate(graph, built, promised(ir.load(graph).graph))
