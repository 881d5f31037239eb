"""What the runtime asks of an inference engine: ONNX Runtime (`ort*.py`) or TensorRT (`trt.py`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vlm_edge.errors import ExtraMissing, SettingError
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.media import Media
from vlm_edge.runtime.plans import PlanStore

DEVICES = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
LANGUAGE = ("llm_encoder", "llm")  # engines that a decoder is made of


class Engine(Protocol):
    """One stateless graph."""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            EngineFailure: the engine refuses the feeds or fails.
        """

    def close(self) -> None: ...


class Decoder(Protocol):
    """A language model with its cache, both on the device.

    Decoder-only models keep the prompt and the answer in one cache. An encoder-decoder reads the prompt
    with its encoder and keeps its answer alone.

    Attributes:
        length: positions in the cache; setting a smaller one forgets the later positions.
        capacity: positions the cache has memory for now.
        keeps_prefix: may a prompt be appended to what an earlier one that begins alike has left?
    """

    length: int

    @property
    def keeps_prefix(self) -> bool: ...

    @property
    def capacity(self) -> int: ...

    def history(self, prompt: Sequence[int]) -> list[int]:
        """Token ids before the answer's first, as a repetition penalty counts them: the prompt's, or an
        encoder-decoder's start token."""

    def check_room(self, prompt: int, new: int) -> None:
        """Is there room for a prompt of so many positions and an answer of `new` tokens at most?

        Raises:
            CapacityExceeded: it was built for fewer.
        """

    def attend(self, media: Media) -> None:
        """What the positions of the next `prefill` attend to besides each other, where the model attends
        to pictures; what is decoded after them sees what the last of them does."""

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Take in `embeds` float32 [1, s, width]; logits float32 [vocab] of what follows them."""

    def decode(self, embeds: np.ndarray) -> np.ndarray:
        """Append one position, float32 [width]; its logits [vocab], valid until the next call."""

    def clear(self) -> None:
        """Forget all positions, values included: a masked position that is not finite still spreads."""

    def close(self) -> None: ...


def open_engines(
    bundle: Bundle,
    device: str,
    threads: int | None,
    plans: PlanStore | None = None,
    check: bool = True,
) -> tuple[dict[str, Engine], Decoder]:
    """The engines that encode pictures, by name, and the decoder, on the device asked for.

    Args:
        threads: of the host, for one operator; None takes the processors this process may use.
        plans: where TensorRT's engines are; None looks beside the bundle.
        check: compare these with their sha256.

    Raises:
        SettingError: no such device, or plans for one that has none.
        DeviceUnavailable: the device is absent. Nothing falls back to another one.
        ExtraMissing: the package that runs on it is not installed.
    """
    if device not in DEVICES:
        raise SettingError(f"device = {device!r}; known are {', '.join(DEVICES)}")
    if device.startswith("tensorrt"):
        from vlm_edge.runtime import trt

        return trt.open_engines(bundle, device, plans, check)
    if plans is not None:
        raise SettingError(
            f"plans are TensorRT's, for device tensorrt or tensorrt-rtx; not for {device}"
        )
    if device == "cuda" and importlib.util.find_spec("onnxruntime") is None:
        raise ExtraMissing("gpu", "onnxruntime-gpu", "running a bundle on a GPU")
    from vlm_edge.runtime import ort, ort_decoder

    engines: dict[str, Engine] = {
        name: ort.OrtEngine(bundle, name, threads, device)
        for name in bundle.manifest.engines
        if name not in LANGUAGE
    }
    return engines, ort_decoder.open_decoder(bundle, threads, device)
