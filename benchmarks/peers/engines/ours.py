"""Our own runtime, on bundles that our exporter made."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm_edge.benchmarks.peers.protocol import Bits, Generated, Kind, LanguageModel, VisionEncoder

if TYPE_CHECKING:
    from vlm_edge.runtime.vlm import VLM

TITLE = "vlm-edge"
PACKAGES = ("vlm-edge", "onnxruntime")
VARIANTS: Mapping[Kind, Mapping[str, Bits]] = {
    "language": {"fp32": "fp32", "int8": "int8", "int4": "int4"},
    "vision": {"fp32": "fp32", "int8": "int8"},
}
PARTS = {"language": "llm", "vision": "vision"}
BUNDLE = "bundle"


def prepare(kind: Kind, source: Path, llava: Path, variant: str, target: Path) -> None:
    """`vlm export` with the measured part in this precision; the tiny other parts stay in float."""
    from vlm_edge.export.pipeline import export
    from vlm_edge.export.precision import PrecisionPlan

    plan = PrecisionPlan.parse(f"{PARTS[kind]}={variant}")
    export(str(llava), target / BUNDLE, precision=plan)


def load_language(target: Path, variant: str, threads: int) -> LanguageModel:
    return Ours(open_bundle(target, threads))


def load_vision(target: Path, variant: str, threads: int) -> VisionEncoder:
    return Ours(open_bundle(target, threads))


def open_bundle(target: Path, threads: int) -> VLM:
    from vlm_edge import VLM

    return VLM.load(target / BUNDLE, threads=threads)


class Ours:
    """The decoder and the vision encoder of a bundle."""

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        decoder, table = self._vlm.decoder, self._vlm.embeddings
        decoder.length = 0
        begin = time.perf_counter()
        logits = decoder.prefill(table.rows(np.array(prompt))[None])
        tokens = [int(logits.argmax())]
        middle = time.perf_counter()
        for _ in range(steps):
            logits = decoder.decode(table.rows(np.array(tokens[-1:]))[0])
            tokens.append(int(logits.argmax()))
        return Generated(middle - begin, time.perf_counter() - middle, tokens)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return self._vlm.vision.run({"pixel_values": pixels})["features"]
