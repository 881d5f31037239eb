"""TensorRT-RTX as tests use it: parse and build on a machine without a GPU, and read the layer dump.

Needs requirements/tensorrt-rtx.txt. A plan cannot be loaded without a GPU, so what became of the graph
is read from the builder's own log, where it writes the layers it compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_edge.export.lowering.tensorrt import Profile


@dataclass(frozen=True)
class Built:
    """What became of a graph.

    Attributes:
        size: of the plan, bytes.
        int8_products: names of the graph's nodes whose matrix product multiplies INT8 by INT8.
        dtypes: of all tensors of the engine, as it calls them ("Float", "Int8", "Int4").
    """

    size: int
    int8_products: frozenset[str]
    dtypes: frozenset[str]


class Refused(Exception):
    """TensorRT does not parse or build the graph; its own words."""


class Builder:
    """One TensorRT builder, for the GPU generation of the Jetson Orin's desktop relatives (8.6)."""

    def __init__(self) -> None:
        import tensorrt_rtx_bindings as trt

        class Log(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []
                self.layers = ""

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    self.errors.append(message)
                if message.startswith("Layers:"):
                    self.layers = message

        self._trt, self._log = trt, Log()
        self._builder = trt.Builder(self._log)

    def build(self, graph: Path, profiles: tuple[Profile, ...]) -> Built:
        """Parse and build `graph`, strongly typed: every precision is the graph's own.

        Raises:
            Refused: it cannot be.
        """
        trt, log, builder = self._trt, self._log, self._builder
        log.errors, log.layers = [], ""
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise Refused(f"parse: {'; '.join(errors)}")
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # how its own samples cast a layer
                layer.attention.decomposable = True  # float32 has no fused kernel
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, span in shapes.items():
                profile.set_shape(name, *span)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Refused(f"build: {'; '.join(log.errors)}")
        return Built(plan.nbytes, _int8_products(log.layers), frozenset(_dtypes(log.layers)))


def _int8_products(layers: str) -> frozenset[str]:
    names: set[str] = set()
    for line in layers.splitlines():
        if "LayerType: gemm" in line:
            factors, _, rest = line.partition("Outputs:")
            if _dtypes(factors)[:2] == ["Int8", "Int8"]:
                names |= set(re.findall(r"\[ONNX Layer: ([^]]+)\]", rest))
    return frozenset(names)


def _dtypes(text: str) -> list[str]:
    return re.findall(r"Datatype: (\w+)", text)
