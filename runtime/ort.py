"""ONNX Runtime on the CPU: stateless engines, and the decoder with its cache updated in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import EngineFailure, ExtraMissing
from vlm_edge.runtime import native
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.feeds import causal_mask, empty_cache, windows
from vlm_edge.runtime.media import Media

try:
    import onnxruntime
except ImportError as error:
    raise ExtraMissing("cpu", "onnxruntime", "running a bundle on the CPU") from error

CHUNK = 256  # positions prefilled at once: keeps attention scores and activations small
STEP = 64  # positions the cache grows by at least, where attention computes the whole width
ROOM = 256  # and where it does not


def open_session(graph: Path, name: str, threads: int | None, frugal: bool = False) -> Any:
    """An InferenceSession on the CPU.

    Args:
        threads: of one operator; None takes the processors this process may use.
        frugal: keep weights in the mapped file instead of a copy packed for speed, and give memory
            back after each run.

    Raises:
        EngineFailure: ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or processors()
    options.log_severity_level = 3
    # Each session has threads of its own, which spin for a while after a run and would take the
    # processors from the next engine: prefill right after vision took twice as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    library = native.library()
    if library is not None:
        options.register_custom_ops_library(str(library))
    if frugal:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library has an exception for each status
        raise EngineFailure(name, _first_line(error)) from error


def kinds() -> tuple[str, ...]:
    """Engine kinds (`EngineEntry.lowered`) that this machine runs, the fastest first."""
    return ("cpu",) if native.library() is None else ("cpu-native", "cpu")


def graph_of(bundle: Bundle, name: str) -> Path:
    """The graph of an engine that this machine runs fastest."""
    return bundle.graph(name, *kinds())


def processors() -> int:
    """Processors this process may use; containers often allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class OrtEngine:
    """One stateless graph (`engine.Engine`)."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        self._name = name
        self._session = open_session(graph_of(bundle, name), name, threads)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            raise EngineFailure(self._name, "it is closed")
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:  # the library has an exception for each status
            raise EngineFailure(self._name, _first_line(error)) from error

    def close(self) -> None:
        self._session = None


def open_decoder(bundle: Bundle, threads: int | None) -> OrtDecoder | OrtEncoderDecoder:
    """The bundle's language model."""
    if bundle.manifest.decoder.start_token_id is None:
        return OrtDecoder(bundle, threads)
    return OrtEncoderDecoder(bundle, threads)


class OrtDecoder:
    """A decoder-only language model (`engine.Decoder`), batch 1.

    Each of a layer's cache arrays is bound as input and output, so a step writes one position and
    copies nothing. It grows with the conversation. Attention that asks for a mask computes the whole
    width it is given, so its cache grows a little at a time; other attention touches no position that is
    not written yet, so its cache grows by half: what is ahead is address space, hardly memory.
    """

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        settings = bundle.manifest.decoder
        self._settings = settings
        self._session = open_session(graph_of(bundle, "llm"), "llm", threads)
        self._inputs = {spec.name for spec in self._session.get_inputs()}
        masks = windows(settings).items()
        self._windows = {name: window for name, window in masks if name in self._inputs}
        self._caches = empty_cache(settings, 0)
        self._constants: dict[str, np.ndarray] = {}
        self._media: Media | None = None
        self._step: _Step | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        return next(iter(self._caches.values())).shape[2]

    @property
    def keeps_prefix(self) -> bool:
        # Dynamic RoPE rotates all positions by the length of the call: an earlier call's do not fit.
        return self._settings.chunked_prefill

    def history(self, prompt: Sequence[int]) -> list[int]:
        return list(prompt)

    def read(self, constants: dict[str, np.ndarray]) -> None:
        """From now on every step reads these inputs too."""
        self._constants, self._step = constants, None

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
        self.length, self._media = 0, None
        self._caches = empty_cache(self._settings, 0)

    def close(self) -> None:
        self._step = self._session = None
        self._caches.clear()
        self._constants.clear()

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
        for name, new in empty_cache(self._settings, capacity).items():
            new[:, :, : self.length] = self._caches[name][:, :, : self.length]
            self._caches[name] = new  # the old one's memory goes back before the next copy


class OrtEncoderDecoder:
    """An encoder-decoder (`engine.Decoder`), batch 1: T5.

    The encoder reads a prompt once, whole, and gives what every layer of the decoder attends to: its keys
    and values stay bound to the decoder's steps until the next prompt.
    """

    keeps_prefix = False  # every position of a prompt is encoded in the light of all others

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        start = bundle.manifest.decoder.start_token_id
        assert start is not None, "an encoder-decoder has a start token"
        self._encoder = OrtEngine(bundle, "llm_encoder", threads)
        self._decoder = OrtDecoder(bundle, threads)
        self._start, self._start_embeds = start, bundle.embeddings().row(start)

    @property
    def length(self) -> int:
        return self._decoder.length

    @length.setter
    def length(self, length: int) -> None:
        self._decoder.length = length

    @property
    def capacity(self) -> int:
        return self._decoder.capacity

    def history(self, prompt: Sequence[int]) -> list[int]:
        return [self._start]

    def attend(self, media: Media) -> None:
        raise EngineFailure("llm", "an encoder-decoder attends to no pictures")

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        self._decoder.length = 0
        self._decoder.read(self._encoder.run({"inputs_embeds": embeds}))
        return self._decoder.prefill(self._start_embeds[None, None])

    def decode(self, embeds: np.ndarray) -> np.ndarray:
        return self._decoder.decode(embeds)

    def clear(self) -> None:
        self._decoder.clear()

    def close(self) -> None:
        self._encoder.close()
        self._decoder.close()


class _Step:
    """Bindings for a fixed number of positions: arrays are filled in place, then the graph runs."""

    def __init__(self, decoder: OrtDecoder, size: int, logits: np.ndarray) -> None:
        settings, capacity = decoder._settings, decoder.capacity
        self._capacity = capacity
        self._session, self._windows = decoder._session, decoder._windows
        self.logits = logits
        self._embeds = np.empty((1, size, settings.width), np.float32)
        self._positions = np.empty((1, size), np.int64)
        self._write = self._positions[0, :1]  # a step writes where it begins
        self._masks = {
            name: np.empty((1, 1, size, capacity), np.float32) for name in decoder._windows
        }
        self._media, seen = decoder._media, {}
        if self._media is not None:
            width = self._media.mask.shape[1]
            seen["media_mask"] = np.empty((1, 1, size, width), np.float32)
            seen["media_gate"] = np.empty((1, size, 2), np.float32)
        self._seen = seen
        self._binding = self._session.io_binding()
        value = onnxruntime.OrtValue.ortvalue_from_numpy  # on the CPU it wraps the array, no copy
        feeds = {
            "inputs_embeds": self._embeds,
            "positions": self._positions,
            "write_indices": self._write,
            "logit_positions": np.array([size - 1], np.int64),
            **self._masks,
            **decoder._constants,
            **seen,
        }
        self._alive = [feeds, logits, list(decoder._caches.values())]
        for name in feeds.keys() & decoder._inputs:
            self._binding.bind_ortvalue_input(name, value(feeds[name]))
        self._binding.bind_ortvalue_output("logits", value(logits))
        for name, cache in decoder._caches.items():
            shared = value(cache)  # one value as past and present is what makes the update in place
            self._binding.bind_ortvalue_input(f"past.{name}", shared)
            self._binding.bind_ortvalue_output(f"present.{name}", shared)

    def run(self, embeds: np.ndarray, start: int, rows: slice) -> None:
        """Positions start, start + 1, ... through the graph; `embeds` float32 of `size` rows.

        Args:
            rows: of the media, what these positions see.
        """
        size = self._positions.shape[1]
        self._embeds[0] = embeds
        self._positions[0] = np.arange(start, start + size)
        for name, window in self._windows.items():
            self._masks[name][0, 0] = causal_mask(self._positions[0], self._capacity, window)
        if self._media is not None:
            self._seen["media_mask"][0, 0] = self._media.mask[rows]
            self._seen["media_gate"][0] = self._media.gate[rows]
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library has an exception for each status
            raise EngineFailure("llm", _first_line(error)) from error
