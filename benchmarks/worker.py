"""The process that a bundle is measured in: orders come as JSON lines on stdin, answers go to stdout.

A process of its own makes the peak memory the bundle's own, and a load the first of its process.

    {"bundle", "image", "prompt", ...} -> {"load_s", "prompt_tokens", "visual_tokens", ...}
    {"run": n}                         -> {"sample": {figure: value}, "span": [begin, first token, end]}
    {"peak": true}                     -> {"peak_rss_mb": value or null}

A span's times are of `time.monotonic`, which all processes share. An error is answered with
{"error": one sentence, "traceback": text} and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_edge.benchmarks.filler import fill
from vlm_edge.errors import EngineFailure, VlmEdgeError

if TYPE_CHECKING:
    from vlm_edge.runtime.prompt import BuiltPrompt
    from vlm_edge.runtime.vlm import VLM

QUESTION = "Describe the image."
PICTURE_SIZE = (640, 480)


def main() -> None:
    """Answer orders until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not get between the answers

    def answer(**values: Any) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    try:
        subject = Subject(**json.loads(sys.stdin.readline()))
        answer(**subject.facts())
        for line in sys.stdin:
            order = json.loads(line)
            if "run" in order:
                sample, span = subject.run()
                answer(sample=sample, span=span)
            else:
                answer(peak_rss_mb=peak_rss_mb())
        subject.vlm.close()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # all are told to the parent, known or not
        known = isinstance(error, (VlmEdgeError, OSError, ImportError, MemoryError))
        text = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        answer(error=text, traceback=traceback.format_exc())
        sys.exit(1)


class Subject:
    """A loaded bundle with the request that every run repeats."""

    def __init__(
        self,
        bundle: str,
        image: str | None,
        no_image: bool,
        prompt: str | None,
        prompt_tokens: int | None,
        new_tokens: int,
        max_tiles: int | None,
        max_visual_tokens: int | None,
        threads: int | None,
        device: str,
        plans: str | None,
    ) -> None:
        from vlm_edge import VLM
        from vlm_edge.runtime.tiling import TileLimits

        self.limits = TileLimits(max_tiles, max_visual_tokens)
        self.vlm: VLM = VLM.load(bundle, device=device, threads=threads, plans=plans)
        self.new_tokens = new_tokens
        self.prompt = prompt or QUESTION
        self.images: list[str | bytes] = [] if no_image else [image or picture()]
        self.template = self.vlm.template is not None
        asked = self.vlm.manifest.prompt
        placed = self.template or asked.visual_tokens_first or asked.interleave is not None
        if not placed and self.images:  # verbatim: the text spells its image place itself
            self.prompt = f"{asked.image_token}\n{self.prompt}"
        if prompt_tokens is not None:
            self.prompt = fill(self.prompt, prompt_tokens, self._count)

    def facts(self) -> dict[str, Any]:
        """What the report says beside the figures."""
        manifest = self.vlm.manifest
        built = self._built(self.prompt)
        return {
            "load_s": self.vlm.load_s,
            "architecture": manifest.architecture,
            "producer": manifest.producer,
            "precisions": {name: engine.precision for name, engine in manifest.engines.items()},
            "prompt_tokens": len(built.token_ids),
            "visual_tokens": built.visual_tokens,
            "tiles": sum(picture.plan.tiles for picture in built.pictures),
            **self._tiling(built),
        }

    def run(self) -> tuple[dict[str, float], tuple[float, float, float]]:
        """One whole request with nothing remembered from the one before: figures, and when it began, gave
        its first token and ended."""
        self.vlm.clear_image_cache()
        begin = time.monotonic()
        result = self.vlm.generate(
            self.prompt,
            self.images,
            self.template,
            max_new_tokens=self.new_tokens,
            ignore_eos=True,
            max_tiles=self.limits.max_tiles,
            max_visual_tokens=self.limits.max_visual_tokens,
        )
        end = time.monotonic()
        if len(result.token_ids) != self.new_tokens:
            found = len(result.token_ids)
            raise EngineFailure("llm", f"{found} tokens came where {self.new_tokens} were asked")
        timings = result.timings
        sample = {
            "prefill_ms": timings.prefill_ms,
            "ttft_ms": timings.ttft_ms,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        }
        if self.images:
            sample["preprocess_ms"] = timings.preprocess_ms
            sample["vision_ms"] = timings.vision_ms
            sample["connector_ms"] = timings.connector_ms
        return sample, (begin, begin + timings.ttft_ms / 1000, end)

    def _tiling(self, built: BuiltPrompt) -> dict[str, Any]:
        """The picture's grid where the model has a choice of them, and what limits changed."""
        tiler = self.vlm.tiler
        if not built.pictures or tiler.grids() == ("1",):
            return {"grid": None, "limited": None}
        (picture,) = built.pictures
        plan, free = picture.plan, tiler.plan(picture.plan.width, picture.plan.height)
        full = {"grid": free.name, "tiles": free.tiles, "tokens": free.tokens}
        return {"grid": plan.name, "limited": full if plan != free else None}

    def _count(self, prompt: str) -> int:
        return len(self._built(prompt).token_ids)

    def _built(self, prompt: str) -> BuiltPrompt:
        return self.vlm.build_prompt(prompt, self.images, self.template, self.limits)


def picture() -> bytes:
    """A JPEG with edges, gradients and grain, the same at every call, for runs without --image."""
    import io

    import numpy as np
    from PIL import Image

    width, height = PICTURE_SIZE
    y, x = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).integers(0, 24, (height, width))
    planes = [x * 255 // width, y * 255 // height, ((x // 40 + y // 40) % 2) * 180]
    pixels = np.stack([np.clip(p + grain, 0, 255) for p in planes], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def peak_rss_mb() -> float | None:
    """The largest resident set of this process so far in 10^6 bytes; None where unknown."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main()
