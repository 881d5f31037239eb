"""The process that one variant of one peer runs in: orders come as JSON lines on stdin.

    {"prepare": {"kind", "source", "llava", "variant", "target"}} -> {}
    {"load": {"kind", "target", "variant", "threads"}}            -> {"load_s", "versions"}
    {"generate": [token, ...], "steps": n}                        -> {"prefill_s", "decode_s", "tokens"}
    {"encode": seed, "size": pixels, "save": path or null}        -> {"encode_s"}
    {"rates": threads}                                            -> {"read", "fp32", "bf16", "int8"}

Answers go to stdout; an error is answered with {"error": one sentence, "traceback": text} and ends the
process. `python -m vlm_edge.benchmarks.peers.worker NAME` loads `engines/NAME.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.benchmarks.peers.protocol import LanguageModel, VisionEncoder


def main() -> None:
    """Answer orders until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not get between the answers
    try:
        session = Session(importlib.import_module(sys.argv[1]))
        for line in sys.stdin:
            answer = session.obey(json.loads(line))
            channel.write(json.dumps(answer) + "\n")
            channel.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # all are told to the parent
        text = " ".join(f"{type(error).__name__}: {error}".split())
        failure = {"error": text, "traceback": traceback.format_exc()}
        channel.write(json.dumps(failure) + "\n")
        channel.flush()
        sys.exit(1)


class Session:
    """One engine (`protocol.Engine`), and the model that it has loaded."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._language: LanguageModel | None = None
        self._vision: VisionEncoder | None = None

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order."""
        if "prepare" in order:
            return self._prepare(**order["prepare"])
        if "load" in order:
            return self._load(**order["load"])
        if "generate" in order:
            assert self._language is not None
            return asdict(self._language.generate(order["generate"], order["steps"]))
        if "encode" in order:
            return self._encode(order["encode"], order["size"], order["save"])
        rates: dict[str, float] = self._engine.rates(order["rates"])
        return rates

    def _prepare(
        self, kind: Any, source: str, llava: str, variant: str, target: str
    ) -> dict[str, Any]:
        self._engine.prepare(kind, Path(source), Path(llava), variant, Path(target))
        return {}

    def _load(self, kind: str, target: str, variant: str, threads: int) -> dict[str, Any]:
        begin = time.perf_counter()
        if kind == "language":
            self._language = self._engine.load_language(Path(target), variant, threads)
        else:
            self._vision = self._engine.load_vision(Path(target), variant, threads)
        spent = time.perf_counter() - begin
        versions = {package: metadata.version(package) for package in self._engine.PACKAGES}
        return {"load_s": spent, "versions": versions}

    def _encode(self, seed: int, size: int, save: str | None) -> dict[str, Any]:
        assert self._vision is not None
        random = np.random.default_rng(seed)
        pixels = random.standard_normal((1, 3, size, size), dtype=np.float32)
        begin = time.perf_counter()
        states = self._vision.encode(pixels)
        spent = time.perf_counter() - begin
        if save is not None:
            np.save(save, states)
        return {"encode_s": spent}


if __name__ == "__main__":
    main()
