"""The processes that `gpu.py` times, ours and transformers: orders as JSON lines, answers likewise.

    {"kind": "ours" or "eager" or "compiled", "source": folder, "request": ...} -> facts
    {"run": n}        -> {"sample": {figure: value}}
    {"tokens": n}     -> {"tokens": [n greedy token ids]}

transformers gets the prompt's token ids and pixels from a file that ours has written, so both compute the
same. Its decode picks the next token on the GPU and waits for it only at the end: the best it can do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_edge.benchmarks.worker import Subject
from vlm_edge.errors import VlmEdgeError
from vlm_edge.runtime.prompt import BuiltPrompt
from vlm_edge.runtime.vlm import VLM, Result

if TYPE_CHECKING:
    from vlm_edge.benchmarks.gpu_torch import Transformers


class Ours:
    """A bundle on a device, with the request that every run repeats."""

    def __init__(self, source: str, request: dict[str, Any], save: str) -> None:
        self._subject = Subject(bundle=source, **request)
        built = self._subject._built(self._subject.prompt)
        save_request(self._subject.vlm, built, Path(save))

    def facts(self) -> dict[str, Any]:
        return self._subject.facts()

    def run(self) -> dict[str, float]:
        times = self._answer(self._subject.new_tokens).timings
        image = times.vision_ms + times.connector_ms
        return {
            "image_ms": image,
            "prefill_ms": times.prefill_ms,
            "first_ms": image + times.prefill_ms,
            "ttft_ms": times.ttft_ms,
            "decode_tokens_per_s": times.decode_tokens_per_s,
        }

    def tokens(self, count: int) -> list[int]:
        return self._answer(count).token_ids

    def _answer(self, count: int) -> Result:
        """A whole request with nothing remembered from the one before."""
        subject = self._subject
        subject.vlm.clear_image_cache()
        return subject.vlm.generate(
            subject.prompt, subject.images, subject.template, max_new_tokens=count, ignore_eos=True
        )


def save_request(vlm: VLM, built: BuiltPrompt, path: Path) -> None:
    """What the peers compute with: token ids int64 [n], pixels float32 [tiles, 3, height, width]."""
    pixels = np.concatenate([vlm.pixels(each) for each in built.pictures])
    np.savez(path, token_ids=np.array(built.token_ids, np.int64), pixels=pixels)


def open_subject(order: dict[str, Any]) -> Ours | Transformers:
    """The subject that a first order asks for."""
    if order["kind"] == "ours":
        return Ours(order["source"], order["request"], order["save"])
    if order["kind"] not in ("eager", "compiled"):
        raise ValueError(f"no subject is called {order['kind']}")
    from vlm_edge.benchmarks.gpu_torch import Transformers

    device, compiled = order["device"], order["kind"] == "compiled"
    dtype = "float32" if device == "cpu" else "float16"  # a processor has no quick float16
    return Transformers(order["source"], order["request"], order["steps"], device, compiled, dtype)


def main() -> None:
    """Answer orders until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not get between the answers

    def answer(values: dict[str, Any]) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    try:
        subject = open_subject(json.loads(sys.stdin.readline()))
        answer(subject.facts())
        for line in sys.stdin:
            order = json.loads(line)
            if "run" in order:
                answer({"sample": subject.run()})
            else:
                answer({"tokens": subject.tokens(order["tokens"])})
    except Exception as error:  # all are told to the parent, known or not
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        known = isinstance(error, VlmEdgeError)
        answer({"error": text if known else f"{type(error).__name__}: {text}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
