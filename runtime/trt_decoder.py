"""A language model on TensorRT, its cache on the GPU.

A decode step is bound by reading the weights, so all else is kept off its path: its small inputs lie side by
side and go over in one copy (on an integrated GPU in none), the logits of one position come back, and after
its first two runs the whole step is one CUDA graph. Prefill and decode are two profiles of one engine, each
with a context of its own, so that switching costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlm_edge.errors import CapacityExceeded, EngineFailure
from vlm_edge.runtime.cuda import DeviceMemory, Gpu, Graph
from vlm_edge.runtime.feeds import causal_mask, windows
from vlm_edge.runtime.manifest import DecoderSettings
from vlm_edge.runtime.media import Media
from vlm_edge.runtime.trt_engine import Context, LoadedEngine, Shape, Tensor, check_shape
from vlm_edge.runtime.trt_memory import Block, LayerCache, NewPositions, pack

PREFILL, DECODE = 0, 1  # profiles, as `export/lowering/tensorrt.py` orders them
SMALL = ("inputs_embeds", "positions", "write_indices", "logit_positions")
SEEN = ("media_mask", "media_gate")  # what differs by position where the model attends to pictures


class TrtDecoder:
    """A decoder-only language model (`engine.Decoder`), batch 1, with room for a fixed number of positions.

    Args:
        loaded: the engine; its dtypes and limits are its own, not the manifest's.
        scratch: for activations, shared with the other engines of the GPU.
        picture: positions of one picture, where the model attends to pictures.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        gpu: Gpu,
        scratch: DeviceMemory,
        settings: DecoderSettings,
        picture: int,
    ) -> None:
        self._loaded, self._gpu, self._settings = loaded, gpu, settings
        self._picture = picture
        if loaded.profiles != 2:
            raise EngineFailure(
                loaded.name, f"it has {loaded.profiles} profiles instead of 2 (prefill and decode)"
            )
        self._windows = {
            name: window for name, window in windows(settings).items() if name in loaded.inputs
        }
        self._caches = self._open_caches()
        known = {*SMALL, *SEEN, *self._windows, *(f"past.{cache.name}" for cache in self._caches)}
        self._constants = {
            name: gpu.allocate(_bytes(loaded.most(name), tensor), name)
            for name, tensor in loaded.inputs.items()
            if name not in known
        }
        self._shapes: dict[str, Shape] | None = None if self._constants else {}
        self._media: Media | None = None
        self._steps = [_Step(self, scratch, profile) for profile in (PREFILL, DECODE)]
        self.length = 0
        gpu.enter()

    @property
    def capacity(self) -> int:
        return self._caches[0].capacity

    @property
    def keeps_prefix(self) -> bool:
        # Dynamic RoPE rotates all positions by the length of the call: an earlier call's do not fit.
        return self._settings.chunked_prefill

    def history(self, prompt: Sequence[int]) -> list[int]:
        return list(prompt)

    def check_room(self, prompt: int, new: int) -> None:
        needed = prompt + new - 1  # the last token is not read again
        if needed > self.capacity:
            what = f"a prompt of {prompt} tokens with up to {new} new ones"
            raise CapacityExceeded(what, needed, self.capacity, "--capacity")

    def read(self, constants: Mapping[str, np.ndarray]) -> None:
        """From now on every step reads these inputs too, rounded to the types that the engine takes.

        Raises:
            CapacityExceeded, EngineFailure: they are larger than what it was built for.
        """
        self._check_open()
        self._gpu.use()
        found = {name: constants[name] for name in self._constants if name in constants}
        if not found:
            self._shapes = None if self._constants else {}
            return
        inputs = self._loaded.inputs
        arrays = {n: np.ascontiguousarray(a, inputs[n].dtype) for n, a in found.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        for name, shape in shapes.items():
            axes = ("batch", "heads", "source", "head_dim") if name.startswith("cross.") else ()
            check_shape(self._loaded.name, name, shape, self._loaded.most(name), axes)
        for name, array in arrays.items():
            self._gpu.copy_in(self._constants[name].address, array.ctypes.data, array.nbytes)
        self._gpu.synchronize()
        self._shapes = shapes

    def attend(self, media: Media) -> None:
        """As `engine.Decoder`.

        Raises:
            CapacityExceeded: there are more pictures than the engine was built for.
        """
        needed, room = media.mask.shape[1], self._loaded.most(SEEN[0])[-1]
        if needed > room:
            pictures = -(-needed // self._picture)
            what = "the number of pictures before a question"
            raise CapacityExceeded(what, pictures, room // self._picture, "--images")
        self.read(media.arrays)
        self._media = media

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """As `engine.Decoder`.

        Raises:
            CapacityExceeded: more positions than there is room for; nothing has been computed.
        """
        count = embeds.shape[1]
        self._reserve(count)
        step, longest = self._steps[PREFILL], self._loaded.inputs["inputs_embeds"].most[PREFILL][1]
        if not self._settings.chunked_prefill and count > longest:
            raise CapacityExceeded("a prompt of this model", count, longest, "--chunk")
        for start in range(0, count, longest):
            chunk = embeds[:, start : start + longest]
            rows = slice(start, start + chunk.shape[1])
            step.run(chunk, self.length, rows, last=start + longest >= count)
            self.length += chunk.shape[1]
        return step.logits()

    def decode(self, embeds: np.ndarray) -> np.ndarray:
        self._reserve(1)
        step = self._steps[DECODE]
        step.run(embeds[None, None], self.length, slice(-1, None), last=True)
        logits = step.logits()
        self.length += 1
        return logits

    def clear(self) -> None:
        self._check_open()
        self.read({})
        self.length, self._media = 0, None
        self._zero()

    def close(self) -> None:
        if self._loaded.engine is None:
            return
        self._gpu.settle()
        for step in self._steps:
            step.close()
        self._steps.clear()
        self._loaded.close()
        for memory in (self._memory, *self._constants.values()):
            self._gpu.free(memory)
        self._gpu.leave()

    def _check_open(self) -> None:
        if self._loaded.engine is None:
            raise EngineFailure(self._loaded.name, "it is closed")

    def _reserve(self, count: int) -> None:
        """Is there all that the next `count` positions need?"""
        self._check_open()
        needed = self.length + count
        if needed > self.capacity:
            raise CapacityExceeded("this conversation", needed, self.capacity, "--capacity")
        if self._shapes is None or (self._media is None and SEEN[0] in self._loaded.inputs):
            raise EngineFailure(self._loaded.name, "it was not told what to attend to")
        self._gpu.use()

    def _zero(self) -> None:
        self._gpu.zero(self._memory)
        self._gpu.synchronize()

    def _open_caches(self) -> list[LayerCache]:
        """All caches in one block of zeros."""
        loaded = self._loaded
        pasts = [tensor for name, tensor in loaded.inputs.items() if name.startswith("past.")]
        sizes = {past.name: _bytes(loaded.most(past.name), past) for past in pasts}
        offsets, size = pack(sizes)
        self._memory = self._gpu.allocate(size, "the cache")
        self._zero()
        caches = []
        for past in pasts:
            _, heads, capacity, width = loaded.most(past.name)
            name = past.name.removeprefix("past.")
            in_place = loaded.updates_in_place(f"present.{name}", past.name)
            if not in_place and loaded.outputs[f"present.{name}"].shape[2] == capacity:
                why = f"present.{name} is a second cache, not an update of {past.name}"
                raise EngineFailure(loaded.name, f"{why}; build it again with `vlm build`")
            address = self._memory.address + offsets[past.name]
            row = width * past.dtype.itemsize
            caches.append(LayerCache(name, address, not in_place, heads, capacity, row))
        return caches


class _Step:
    """Runs of one profile: its context, its inputs side by side, its logits."""

    def __init__(self, decoder: TrtDecoder, scratch: DeviceMemory, profile: int) -> None:
        self._decoder, self._gpu = decoder, decoder._gpu
        loaded = decoder._loaded
        fixed = all(each.least[profile] == each.most[profile] for each in loaded.inputs.values())
        self._context = Context(loaded, self._gpu, scratch, profile, fixed, profile == DECODE)
        small = [name for name in (*SMALL, *SEEN, *decoder._windows) if name in loaded.inputs]
        self._inputs = {name: loaded.inputs[name] for name in small}
        most = {name: tensor.most[profile] for name, tensor in self._inputs.items()}
        self._block = Block(
            self._gpu, pack({n: _bytes(most[n], loaded.inputs[n]) for n in most})[1]
        )
        output = loaded.outputs["logits"]
        self._logits = Block(self._gpu, decoder._settings.vocab_size * output.dtype.itemsize)
        self._vocabulary = self._logits.arrange({"logits": ((output.shape[-1],), output.dtype)})
        self._context.bind("logits", self._logits.address("logits"))
        self._new = NewPositions(self._gpu, decoder._caches, most["inputs_embeds"][1])
        for cache in decoder._caches:
            past = f"past.{cache.name}"
            self._context.shape(past, loaded.most(past))
            self._context.bind(past, cache.address)
            self._context.bind(f"present.{cache.name}", self._new.address(cache))
        for name, memory in decoder._constants.items():
            self._context.bind(name, memory.address)
        self._profile = profile
        self._views: dict[str, np.ndarray] = {}
        self._arranged: dict[str, Shape] = {}
        self._graph: Graph | None = None
        self._ran, self._capturable = False, True

    def run(self, embeds: np.ndarray, start: int, rows: slice, last: bool) -> None:
        """Queue the positions start, start + 1, ...

        Args:
            embeds: float32 [1, s, width].
            rows: of the media, what these positions see.
            last: are the logits of the last position wanted?
        """
        feeds = self._feeds(embeds, start, rows)
        self._gpu.synchronize()  # what ran before has read its inputs
        self._arrange({name: array.shape for name, array in feeds.items()})
        for name, view in self._views.items():
            view[...] = feeds[name]
        if self._profile == DECODE:
            self._launch()
        else:
            self._queue(last)
        self._new.append(start, embeds.shape[1])

    def logits(self) -> np.ndarray:
        """float32 [vocab], once all that was queued is done."""
        self._gpu.synchronize()
        return self._vocabulary["logits"].astype(np.float32)  # a copy: it outlives the GPU's memory

    def close(self) -> None:
        self._drop_graph()
        del self._context
        self._views.clear()
        self._vocabulary.clear()
        self._block.close()
        self._logits.close()
        self._new.close()

    def _feeds(self, embeds: np.ndarray, start: int, rows: slice) -> dict[str, np.ndarray]:
        decoder, size = self._decoder, embeds.shape[1]
        positions = np.arange(start, start + size)
        feeds = {
            "inputs_embeds": embeds,
            "positions": positions[None],
            "write_indices": positions[:1],
            "logit_positions": np.array([size - 1]),
        }
        for name, window in decoder._windows.items():
            feeds[name] = causal_mask(positions, decoder.capacity, window)[None, None]
        if decoder._media is not None:
            feeds["media_mask"] = decoder._media.mask[rows][None, None]
            feeds["media_gate"] = decoder._media.gate[rows][None]
        return {name: array for name, array in feeds.items() if name in self._inputs}

    def _arrange(self, shapes: dict[str, Shape]) -> None:
        """Lay the inputs out for these shapes, unless they lie so."""
        constants = self._decoder._shapes
        assert constants is not None, "_reserve has asked"
        wanted = {**shapes, **constants}
        if wanted == self._arranged:
            return
        self._drop_graph()  # it reads other addresses and shapes
        for name, shape in wanted.items():
            self._context.shape(name, shape)
        fields = {name: (shape, self._inputs[name].dtype) for name, shape in shapes.items()}
        self._views = self._block.arrange(fields)
        for name in shapes:
            self._context.bind(name, self._block.address(name))
        self._arranged = wanted

    def _queue(self, last: bool = True) -> None:
        self._block.send()
        self._context.enqueue()
        if last:
            self._logits.fetch()

    def _launch(self) -> None:
        """As a graph, if it ran before with these shapes."""
        wanted = self._graph is None and self._ran and self._capturable
        if wanted and self._context.capturable():
            self._graph = self._gpu.capture(self._queue)
            self._capturable = self._graph is not None
        if self._graph is not None:
            self._graph.launch()
        else:
            self._queue()
        self._ran = True

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._gpu.synchronize()
            self._graph.close()
        self._graph, self._ran = None, False


def _bytes(shape: Shape, tensor: Tensor) -> int:
    return int(np.prod(shape)) * tensor.dtype.itemsize
