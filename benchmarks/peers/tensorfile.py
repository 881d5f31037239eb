"""Safetensors files read and copied with numpy alone: every peer's environment has numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class TensorFile:
    """A safetensors file, memory-mapped.

    Attributes:
        shapes: by tensor name.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self._header: dict[str, dict] = header
        self._data = np.memmap(path, np.uint8, "r", offset=8 + size)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def dtype(self, name: str) -> str:
        """As the file spells it: F32, F16, BF16."""
        return str(self._header[name]["dtype"])

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8."""
        begin, end = self._header[name]["data_offsets"]
        return self._data[begin:end]

    def array(self, name: str) -> np.ndarray:
        """float32 in the tensor's shape; BF16 and F16 are widened, which is exact."""
        raw, dtype = self.raw(name), self.dtype(name)
        if dtype == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)
        return values.reshape(self.shapes[name])


def write(path: Path, tensors: Mapping[str, tuple[TensorFile, str]]) -> None:
    """A new file of tensors taken byte by byte from others: new name -> (file, name there)."""
    header, end = {}, 0
    for name, (file, old) in tensors.items():
        begin, end = end, end + file.raw(old).size
        header[name] = {
            "dtype": file.dtype(old),
            "shape": file.shapes[old],
            "data_offsets": [begin, end],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # readers want the data aligned
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for file, old in tensors.values():
            file.raw(old).tofile(out)
