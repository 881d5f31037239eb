"""transformers on torch, the reference implementation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.benchmarks.peers.protocol import Bits, Generated, Kind, LanguageModel, VisionEncoder

TITLE = "transformers"
PACKAGES = ("torch", "transformers")
VARIANTS: Mapping[Kind, Mapping[str, Bits]] = {
    "language": {"fp32": "fp32", "bf16": "bf16"},
    "vision": {"fp32": "fp32", "bf16": "bf16"},
}
LINK = "source"

SIDE = 2048  # of the square matrices whose products tell the machine's rates
OPERATIONS = 2 * SIDE**3
BUFFER = 512 << 20  # bytes read at once, far more than any cache
TRIES = 8


def prepare(kind: Kind, source: Path, llava: Path, variant: str, target: Path) -> None:
    """It reads the checkpoint as it is, which lies beside `target`."""
    (target / LINK).symlink_to(Path("..") / source.name)


def load_language(target: Path, variant: str, threads: int) -> LanguageModel:
    return Causal(target / LINK, variant, threads)


def load_vision(target: Path, variant: str, threads: int) -> VisionEncoder:
    return Encoder(target / LINK, variant, threads)


def load(source: Path, variant: str, threads: int) -> Any:
    """The checkpoint's own class in the variant's dtype, and torch with so many threads."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant]
    config = transformers.AutoConfig.from_pretrained(source)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(source, config=config, dtype=dtype).eval()


class Causal:
    """A language model with its growing cache."""

    def __init__(self, source: Path, variant: str, threads: int) -> None:
        self._model = load(source, variant, threads)

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        import torch

        with torch.inference_mode():
            begin = time.perf_counter()
            output = self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            tokens = [int(output.logits[0, -1].argmax())]
            middle = time.perf_counter()
            for _ in range(steps):
                output = self._model(
                    torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values
                )
                tokens.append(int(output.logits[0, -1].argmax()))
            return Generated(middle - begin, time.perf_counter() - middle, tokens)


class Encoder:
    """A vision encoder."""

    def __init__(self, source: Path, variant: str, threads: int) -> None:
        self._model = load(source, variant, threads)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            inputs = torch.from_numpy(pixels).to(self._model.dtype)
            states = self._model(inputs, output_hidden_states=True).hidden_states[-1]
            found: np.ndarray = states.float().numpy()
            return found


def rates(threads: int) -> dict[str, float]:
    """What the machine does in a second, the best of a few tries, for `limits.Limits`.

    Returns:
        "read", bytes from memory; "fp32", "bf16" and "int8", operations of large matrix products.
    """
    import torch
    from torch.utils import mkldnn

    torch.set_num_threads(threads)
    buffer = torch.ones(BUFFER // 4)
    found = {"read": BUFFER / _quickest(lambda: torch.sum(buffer))}
    with torch.inference_mode():
        # oneDNN's product: the one behind `@` leaves AVX-512 out on some processors.
        layer = mkldnn.to_mkldnn(torch.nn.Linear(SIDE, SIDE))
        x = torch.randn(SIDE, SIDE).to_mkldnn()
        found["fp32"] = OPERATIONS / _quickest(lambda: layer(x))
    a, b = torch.randn(2, SIDE, SIDE).to(torch.bfloat16)
    found["bf16"] = OPERATIONS / _quickest(lambda: a @ b)
    c, d = torch.randint(-127, 128, (2, SIDE, SIDE), dtype=torch.int8)
    found["int8"] = OPERATIONS / _quickest(lambda: torch._int_mm(c, d))
    return found


def _quickest(action: Callable[[], Any]) -> float:
    action()
    times = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)
