"""What torch is asked for beside the bundles: transformers on the same request, and the machine's rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from vlm_edge.benchmarks.gpu_parity import logit_error

GPU_SIDE, CPU_SIDE = 8192, 256  # of the square matrices whose products tell the rates
GPU_BUFFER, CPU_BUFFER = 1 << 30, 64 << 20  # bytes copied at once, far more than any cache


class Transformers:
    """A LLaVA checkpoint in transformers, eager or through torch.compile with a static cache.

    Args:
        request: the file `Ours` has saved.
        steps: tokens of an answer at most.
        dtype: torch's name of it.
    """

    def __init__(
        self, source: str, request: str, steps: int, device: str, compiled: bool, dtype: str
    ) -> None:
        import torch
        import transformers

        self._torch = torch
        self._device = torch.device("cuda" if device != "cpu" else "cpu")
        cls = transformers.LlavaForConditionalGeneration
        model = cls.from_pretrained(source, dtype=getattr(torch, dtype)).eval().to(self._device)
        self._model, self._steps, self._compiled = model, steps, compiled
        with np.load(request) as file:
            self._ids = torch.from_numpy(file["token_ids"])[None].to(self._device)
            self._pixels = torch.from_numpy(file["pixels"]).to(self._device, model.dtype)
        self._encode: Callable[[], Any] = self._features
        self._call: Callable[..., Any] = model
        self._step: Callable[..., Any] = model
        self._static: Any = None
        if compiled:
            self._encode = torch.compile(self._features)
            self._call = torch.compile(model.__call__)
            # CUDA graphs: at batch 1 starting kernels is what eager decode waits for.
            self._step = torch.compile(model.__call__, mode="reduce-overhead")

    def facts(self) -> dict[str, Any]:
        return {"dtype": str(self._model.dtype)}

    def run(self) -> dict[str, float]:
        steps = self._steps - 1
        times, _ = self._generate(steps)
        image, prefill, decode = times
        return {
            "image_ms": 1000 * image,
            "prefill_ms": 1000 * prefill,
            "first_ms": 1000 * (image + prefill),
            "decode_tokens_per_s": steps / decode,
        }

    def tokens(self, count: int) -> list[int]:
        _, tokens = self._generate(count - 1)
        return tokens

    def logits(self, answer: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab], along the answer's tokens, in one pass."""
        torch = self._torch
        with torch.inference_mode():
            rest = torch.tensor([answer[:-1]], dtype=torch.int64, device=self._device)
            ids = torch.cat([self._ids, rest], 1)
            embeds = self._spliced(ids, self._features())
            output = self._model(inputs_embeds=embeds, logits_to_keep=len(answer))
            found: np.ndarray = output.logits[0].float().cpu().numpy()
            return found

    def _features(self) -> Any:
        """Visual tokens [n, width]."""
        found = self._model.get_image_features(pixel_values=self._pixels)
        parts = getattr(found, "pooler_output", found)  # of transformers 4 it is the list itself
        return self._torch.cat(list(parts)).reshape(-1, parts[0].shape[-1])

    def _spliced(self, ids: Any, features: Any) -> Any:
        embeds = self._model.get_input_embeddings()(ids)
        places = (ids == self._model.config.image_token_id)[..., None]
        return embeds.masked_scatter(places, features.to(embeds.dtype))

    def _cache(self, room: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config = self._model.config.get_text_config()
        if not self._compiled:
            return DynamicCache(config=config)
        if self._static is None:
            self._static = StaticCache(config=config, max_cache_len=room)
            # It takes its memory at the first call; compiled code made before that is made again.
            self._model(input_ids=self._ids[:, :1], past_key_values=self._static)
        self._static.reset()
        return self._static

    def _generate(self, steps: int) -> tuple[tuple[float, float, float], list[int]]:
        """Seconds of the picture, the prompt and `steps` more tokens; all tokens."""
        torch = self._torch
        count = self._ids.shape[1]
        with torch.inference_mode():
            cache = self._cache(count + self._steps)
            begin = self._now()
            features = self._encode()
            encoded = self._now()
            embeds = self._spliced(self._ids, features)
            output = self._call(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
            found = [output.logits[:, -1].argmax(-1)]
            prefilled = self._now()
            for position in range(count, count + steps):
                if self._compiled and self._device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                places = torch.full((1, 1), position, device=self._device)
                output = self._step(
                    input_ids=found[-1][:, None], past_key_values=cache, position_ids=places
                )
                found.append(output.logits[:, -1].argmax(-1))
            end = self._now()
        tokens = torch.cat(found).tolist()
        return (encoded - begin, prefilled - encoded, end - prefilled), tokens

    def _now(self) -> float:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
        return time.perf_counter()


def float16_error(source: str, request: str, answer: Sequence[int], device: str) -> float:
    """What float16 costs the reference implementation: the largest |float16 - float32| / |float32| of its
    logits along an answer."""
    found = []
    for dtype in ("float32", "float16"):
        model = Transformers(source, request, 1, device, compiled=False, dtype=dtype)
        found.append(model.logits(answer))
        del model
    exact, half = found
    return logit_error(half, exact)


def rates(device: str, tries: int = 10) -> Iterator[dict[str, float]]:
    """What the machine does in a second, by torch; one more figure each time.

    Yields:
        copy_gb_s: 10^9 bytes, read plus written, of a device-to-device copy.
        fp16_tflops, int8_tops: 10^12 multiplications and additions of a large matrix product.
    """
    import torch

    gpu = device != "cpu"
    side, size = (GPU_SIDE, GPU_BUFFER) if gpu else (CPU_SIDE, CPU_BUFFER)
    at = torch.device("cuda" if gpu else "cpu")
    found: dict[str, float] = {}

    def median(action: Callable[[], object]) -> float:
        return statistics.median(_seconds(action, at.type, tries))

    buffers = torch.empty((2, size), dtype=torch.uint8, device=at).random_()
    found["copy_gb_s"] = 2 * size / median(lambda: buffers[0].copy_(buffers[1])) / 1e9
    yield dict(found)
    operations = 2 * side**3
    a, b = torch.randn(2, side, side, device=at).to(torch.float16)
    found["fp16_tflops"] = operations / median(lambda: a @ b) / 1e12
    yield dict(found)
    c, d = torch.randint(-127, 128, (2, side, side), dtype=torch.int8, device=at)
    columns = d.t()  # cuBLAS' INT8 product wants the second matrix column by column
    found["int8_tops"] = operations / median(lambda: torch._int_mm(c, columns)) / 1e12
    yield dict(found)


def _seconds(action: Callable[[], object], kind: str, tries: int) -> list[float]:
    """Of each run after a warm-up, by the device's own clock where it has one."""
    import torch

    for _ in range(3):
        action()
    if kind != "cuda":
        times = []
        for _ in range(tries):
            begin = time.perf_counter()
            action()
            times.append(time.perf_counter() - begin)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(tries + 1)]
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]
