"""How a decoder's memory lies on the GPU: small inputs side by side, caches, and what is new in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.cuda import Gpu, HostMemory
from vlm_edge.runtime.trt_engine import ALIGNMENT, Shape


@dataclass(frozen=True)
class LayerCache:
    """Keys or values of one layer.

    Attributes:
        name: "key.0"; the engine reads `past.<name>` and writes `present.<name>`.
        address: of [1, kv_heads, capacity, head_dim].
        apart: does the engine write the new positions alone, [1, kv_heads, s, head_dim], to be copied
            behind the others? Else it writes them into the cache itself.
        row: bytes of a position of one head.
    """

    name: str
    address: int
    apart: bool
    heads: int
    capacity: int
    row: int

    def bytes(self, positions: int) -> int:
        return self.heads * positions * self.row


class NewPositions:
    """Where an engine that does not update its caches writes the new positions, and their way into them.

    Args:
        longest: positions of one run.
    """

    def __init__(self, gpu: Gpu, caches: Sequence[LayerCache], longest: int) -> None:
        self._gpu, self._longest = gpu, longest
        self._caches = [cache for cache in caches if cache.apart]
        self._offsets, size = pack({each.name: each.bytes(longest) for each in self._caches})
        self._memory = gpu.allocate(size, "the cache's new positions") if self._caches else None
        self._even = self._without_gaps()

    def address(self, cache: LayerCache) -> int:
        """Where `present.*` of a cache is written."""
        if self._memory is None or not cache.apart:
            return cache.address
        return self._memory.address + self._offsets[cache.name]

    def append(self, start: int, size: int) -> None:
        """Queue the copies of `size` positions to the caches' positions from `start` on."""
        if self._even and size == self._longest:
            self._copy(self._caches[0], start, size, len(self._caches))
            return
        for cache in self._caches:
            self._copy(cache, start, size, 1)

    def close(self) -> None:
        if self._memory is not None:
            self._gpu.free(self._memory)

    def _without_gaps(self) -> bool:
        """Do caches lie side by side, and the longest new positions too, so that the heads of all layers are
        rows of one copy? Those of real models do; a step of 24 layers would be 48 copies."""
        if not self._caches:
            return False
        first = self._caches[0]
        return all(
            cache.address == first.address + index * first.bytes(first.capacity)
            and self._offsets[cache.name] == index * first.bytes(self._longest)
            and (cache.heads, cache.row) == (first.heads, first.row)
            for index, cache in enumerate(self._caches)
        )

    def _copy(self, first: LayerCache, start: int, size: int, caches: int) -> None:
        width = size * first.row
        self._gpu.copy_rows(
            target=first.address + start * first.row,
            target_pitch=first.capacity * first.row,
            source=self.address(first),
            source_pitch=width,
            width=width,
            rows=caches * first.heads,
        )


class Block:
    """Arrays side by side in the host's memory, and the same on the GPU: one copy takes all of them there or
    back. On an integrated GPU both are one, and nothing is copied."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self._gpu = gpu
        self._host: HostMemory = gpu.host(size, "inputs and logits")
        mapped = self._host.mapped is not None
        self._device = None if mapped else gpu.allocate(size, "inputs and logits")
        self._offsets: dict[str, int] = {}
        self._used = 0

    def arrange(self, fields: Mapping[str, tuple[Shape, np.dtype]]) -> dict[str, np.ndarray]:
        """Views of the host's memory by name, for these shapes; earlier ones are no longer valid."""
        sizes = {
            name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in fields.items()
        }
        self._offsets, self._used = pack(sizes)
        return {
            name: self._host.array[self._offsets[name] :][: sizes[name]].view(dtype).reshape(shape)
            for name, (shape, dtype) in fields.items()
        }

    def address(self, name: str) -> int:
        """On the GPU."""
        return self._base() + self._offsets[name]

    def send(self) -> None:
        if self._device is not None:
            self._gpu.copy_in(self._device.address, self._host.address, self._used)

    def fetch(self) -> None:
        if self._device is not None:
            self._gpu.copy_out(self._host.address, self._device.address, self._used)

    def close(self) -> None:
        self._gpu.free(self._host)
        if self._device is not None:
            self._gpu.free(self._device)

    def _base(self) -> int:
        if self._device is not None:
            return self._device.address
        assert self._host.mapped is not None
        return self._host.mapped


def pack(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of byte ranges side by side, each aligned as CUDA aligns memory, and the end of the last."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + size
    return offsets, end
