"""A language model on ONNX Runtime: its cache stays on the device and is updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from vlm_edge.errors import EngineFailure
from vlm_edge.runtime import ort
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.encoder_decoder import EncoderDecoder
from vlm_edge.runtime.feeds import causal_mask, empty_cache, windows
from vlm_edge.runtime.media import Media
from vlm_edge.runtime.ort_inputs import Place, StepInputs, device_inputs, dtypes

CHUNK = 256  # positions prefilled at once: keeps attention scores and activations small
STEP = 64  # positions the cache grows by at least, where attention computes the whole width
ROOM = 256  # and where it does not


def open_decoder(
    bundle: Bundle, threads: int | None, device: str = "cpu"
) -> OrtDecoder | EncoderDecoder:
    """The bundle's language model."""
    decoder, start = OrtDecoder(bundle, threads, device), bundle.manifest.decoder.start_token_id
    if start is None:
        return decoder
    encoder = ort.OrtEngine(bundle, "llm_encoder", threads, device)
    return EncoderDecoder(encoder, decoder, start, bundle.embeddings().row(start))


class OrtDecoder:
    """A decoder-only language model (`engine.Decoder`), batch 1.

    Each of a layer's cache arrays is bound as input and output, so a step writes one position and
    copies nothing. It grows with the conversation. Attention that asks for a mask computes the whole
    width it is given, so its cache grows a little at a time; other attention touches no position that is
    not written yet, so its cache grows by half: what is ahead is address space, hardly memory.

    On a GPU a step sends up one block (the embeddings row, positions, masks) and brings back the last
    position's logits; to grow, the cache passes through the host, since ONNX Runtime copies no part of
    an array between two places of a device.
    """

    def __init__(self, bundle: Bundle, threads: int | None, device: str = "cpu") -> None:
        settings = bundle.manifest.decoder
        self._settings = settings
        graph = ort.graph_of(bundle, "llm", device)
        self._session = ort.open_session(graph, "llm", threads, device=device)
        self._place: Place = (device, 0)
        self._dtypes, self._remote = dtypes(self._session), device_inputs(self._session)
        masks = windows(settings).items()
        self._windows = {name: window for name, window in masks if name in self._dtypes}
        self._constants: dict[str, Any] = {}
        self._media: Media | None = None
        self._step: _Step | None = None
        self._empty()

    @property
    def capacity(self) -> int:
        return int(next(iter(self._caches.values())).shape()[2])

    @property
    def keeps_prefix(self) -> bool:
        # Dynamic RoPE rotates all positions by the length of the call: an earlier call's do not fit.
        return self._settings.chunked_prefill

    def history(self, prompt: Sequence[int]) -> list[int]:
        return list(prompt)

    def check_room(self, prompt: int, new: int) -> None:
        """There is: the cache grows."""

    def read(self, constants: dict[str, np.ndarray]) -> None:
        """From now on every step reads these inputs too (`CrossDecoder.read`)."""
        self._step = None
        self._constants = {
            name: self._value(np.ascontiguousarray(array, self._dtypes[name]))
            for name, array in constants.items()
            if name in self._dtypes
        }

    def attend(self, media: Media) -> None:
        self._media = media
        self.read(media.arrays)

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        count = embeds.shape[1]
        self._reserve(self.length + count)
        logits = np.empty((1, 1, self._settings.vocab_size), np.float32)
        longest = CHUNK if self._settings.chunked_prefill else count
        for start in range(0, count, longest):
            chunk = embeds[:, start : start + longest]
            size = chunk.shape[1]
            _Step(self, size, logits).run(chunk, self.length, slice(start, start + size))
            self.length += size
        return logits[0, 0]

    def decode(self, embeds: np.ndarray) -> np.ndarray:
        self._reserve(self.length + 1)
        if self._step is None:
            self._step = _Step(self, 1, np.empty((1, 1, self._settings.vocab_size), np.float32))
        self._step.run(embeds, self.length, slice(-1, None))
        self.length += 1
        return self._step.logits[0, 0]

    def clear(self) -> None:
        self.read({})
        self._media = None
        self._empty()

    def close(self) -> None:
        self._step = self._session = None
        self._caches.clear()
        self._constants.clear()

    def _value(self, array: np.ndarray) -> Any:
        """An OrtValue; on the CPU it wraps the array, no copy."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._place)

    def _arrays(self, capacity: int) -> dict[str, np.ndarray]:
        """Empty cache arrays of the host, of the types that the graph has."""
        kinds = {name.removeprefix("past."): kind for name, kind in self._dtypes.items()}
        return empty_cache(self._settings, capacity, kinds)

    def _empty(self) -> None:
        self.length = 0
        self._caches = {name: self._value(array) for name, array in self._arrays(0).items()}

    def _reserve(self, needed: int) -> None:
        if self._session is None:
            raise EngineFailure("llm", "it is closed")
        if needed <= self.capacity:
            return
        # A share of the length at a time, so that copying stays a small part whatever the length.
        least, share = (STEP, 8) if self._windows else (ROOM, 2)
        step = max(least, needed // share // STEP * STEP)
        capacity = -(-needed // step) * step
        self._step = None  # its bindings point at the old arrays
        for name, new in self._arrays(capacity).items():
            if self.length:
                new[:, :, : self.length] = self._caches[name].numpy()[:, :, : self.length]
            self._caches[name] = self._value(new)  # the old one's memory goes before the next copy


class _Step:
    """Bindings for a fixed number of positions: arrays are filled in place, then the graph runs."""

    def __init__(self, decoder: OrtDecoder, size: int, logits: np.ndarray) -> None:
        settings = decoder._settings
        self._capacity = decoder.capacity
        self._session, self._windows = decoder._session, decoder._windows
        self._media, self.logits = decoder._media, logits
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "inputs_embeds": ((1, size, settings.width), np.float32),
            "positions": ((1, size), np.int64),
            "write_indices": ((1,), np.int64),
            "logit_positions": ((1,), np.int64),
        }
        for name in self._windows:
            shapes[name] = ((1, 1, size, self._capacity), np.float32)
        if self._media is not None:
            shapes["media_mask"] = ((1, 1, size, self._media.mask.shape[1]), np.float32)
            shapes["media_gate"] = ((1, size, 2), np.float32)
        self._inputs = StepInputs(shapes, decoder._place, decoder._remote)
        self._arrays = self._inputs.arrays
        self._arrays["logit_positions"][0] = size - 1
        self._binding = self._session.io_binding()
        self._inputs.bind(self._binding, decoder._dtypes.keys())
        for name, constant in decoder._constants.items():
            self._binding.bind_ortvalue_input(name, constant)
        for name, cache in decoder._caches.items():
            # One value as past and present is what makes the update in place.
            self._binding.bind_ortvalue_input(f"past.{name}", cache)
            self._binding.bind_ortvalue_output(f"present.{name}", cache)
        # Of the host wherever the graph runs: ONNX Runtime copies its result there.
        self._binding.bind_ortvalue_output(
            "logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits)
        )

    def run(self, embeds: np.ndarray, start: int, rows: slice) -> None:
        """Positions start, start + 1, ... through the graph; `embeds` float32 of `size` rows.

        Args:
            rows: of the media, what these positions see.
        """
        arrays = self._arrays
        arrays["inputs_embeds"][0] = embeds
        positions = arrays["positions"][0]
        positions[:] = np.arange(start, start + len(positions))
        arrays["write_indices"][0] = start
        for name, window in self._windows.items():
            arrays[name][0, 0] = causal_mask(positions, self._capacity, window)
        if self._media is not None:
            arrays["media_mask"][0, 0] = self._media.mask[rows]
            arrays["media_gate"][0] = self._media.gate[rows]
        self._inputs.upload()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library has an exception for each status
            raise ort.failure("llm", error) from error
