"""What the runtime asks of an inference engine; one file implements it for each (`ort.py`)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vlm_edge.errors import DeviceUnavailable, SettingError
from vlm_edge.runtime.bundle import Bundle

DEVICES = ("cpu", "cuda", "tensorrt")


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

    Attributes:
        length: positions in the cache; setting a smaller one forgets the later positions.
        capacity: positions the cache has memory for now.
    """

    length: int

    @property
    def capacity(self) -> int: ...

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Append `embeds` float32 [1, s, width] to the cache; logits float32 [vocab] of the last."""

    def decode(self, embeds: np.ndarray) -> np.ndarray:
        """Append one position, float32 [width]; its logits [vocab], valid until the next call."""

    def clear(self) -> None:
        """Forget all positions, values included: a masked position that is not finite still spreads."""

    def close(self) -> None: ...


def open_engines(
    bundle: Bundle, device: str, threads: int | None
) -> tuple[dict[str, Engine], Decoder]:
    """The bundle's stateless engines by name, and its decoder, on the device asked for.

    Raises:
        SettingError: no such device.
        DeviceUnavailable: the device is absent. Nothing falls back to another one.
    """
    if device not in DEVICES:
        raise SettingError(f"device = {device!r}; known are {', '.join(DEVICES)}")
    if device != "cpu":
        raise DeviceUnavailable(
            device, 'this version runs on device="cpu"; export once, run it there'
        )
    from vlm_edge.runtime import ort

    engines: dict[str, Engine] = {
        name: ort.OrtEngine(bundle, name, threads)
        for name in bundle.manifest.engines
        if name != "llm"
    }
    return engines, ort.OrtDecoder(bundle, threads)
