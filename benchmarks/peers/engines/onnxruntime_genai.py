"""ONNX Runtime GenAI with the graphs of its own model builder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm_edge.benchmarks.peers.protocol import Bits, Generated, Kind, LanguageModel, VisionEncoder

TITLE = "ONNX Runtime GenAI"
PACKAGES = ("onnxruntime-genai", "onnxruntime", "torch", "transformers")
VARIANTS: Mapping[Kind, Mapping[str, Bits]] = {
    "language": {"int8": "int8", "int4": "int4"},
    "vision": {},
}
BLOCK = {"int8": 64, "int4": 32}


def prepare(kind: Kind, source: Path, llava: Path, variant: str, target: Path) -> None:
    """Run the builder; accuracy level 4 computes with INT8 activations, its quickest."""
    options = (f"block_size={BLOCK[variant]}", "accuracy_level=4")
    builder = ("-m", "onnxruntime_genai.models.builder", "-m", "", "-i", str(source))
    done = subprocess.run(
        [sys.executable, *builder, "-o", str(target), "-p", variant, "-e", "cpu",
         "-c", str(target / "cache"), "--extra_options", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"its model builder failed: {done.stderr.strip().splitlines()[-1]}")


def load_language(target: Path, variant: str, threads: int) -> LanguageModel:
    return GenAi(target, threads)


def load_vision(target: Path, variant: str, threads: int) -> VisionEncoder:
    raise NotImplementedError("VARIANTS has none")


class GenAi:
    """A folder of the model builder."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self._api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        params = self._api.GeneratorParams(self._model)
        length = len(prompt) + 1 + steps
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._api.Generator(self._model, params)
        begin = time.perf_counter()
        generator.append_tokens(list(prompt))
        generator.generate_next_token()  # its logits are there: append_tokens ran the prompt
        middle = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        end = time.perf_counter()
        tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        return Generated(middle - begin, end - middle, tokens)
