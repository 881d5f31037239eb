"""Kernels that TensorRT-RTX compiled on this machine, kept in a file, so that the next start finds them.

A plan of TensorRT-RTX holds no finished kernels: they are compiled for the GPU as engines start and as shapes
come. TensorRT-RTX checks what the file was made with (its version, the GPU, the driver) and takes it or not.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any


class KernelCache:
    """The kernels of all engines of a bundle.

    Args:
        path: the file; it need not exist, and a folder that cannot be written is no error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._kept = b""

    def attach(self, config: Any) -> None:
        """Let the context made with this IRuntimeConfig use them; a CUDA context is current."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                self._kept = self._path.read_bytes()
                self._cache.deserialize(self._kept)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what has been compiled since they were read."""
        if self._cache is None:
            return
        serialized = self._cache.serialize()
        if serialized is None:  # it failed, and its log says why
            return
        blob = bytes(memoryview(serialized))
        if blob == self._kept:
            return
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            try:
                part.write_bytes(blob)
                part.replace(self._path)
                self._kept = blob
            finally:
                part.unlink(missing_ok=True)  # the disk was full
