"""A Hugging Face checkpoint folder: config.json and memory-mapped safetensors, never loaded whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from vlm_edge.errors import CheckpointMissing, TensorMissing, TensorShapeMismatch, UnsupportedConfig
from vlm_edge.export.config import Config, read_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CHUNK_BYTES = 64 << 20  # of float32 made at once: what bounds the export's memory


@dataclass(frozen=True)
class TensorRef:
    """A tensor in its file: name and shape are known, the values are read when asked for."""

    name: str
    view: np.ndarray  # memory-mapped, the file's own dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def numpy(self) -> np.ndarray:
        """All values as float32; for tensors that are small."""
        return np.array(self.view, dtype=np.float32)

    def rows(self, step: int | None = None) -> Iterator[np.ndarray]:
        """float32 blocks along the first axis, together the whole tensor, each about CHUNK_BYTES."""
        width = int(np.prod(self.shape[1:], dtype=np.int64)) or 1
        step = step or max(1, CHUNK_BYTES // (4 * width))
        for start in range(0, self.shape[0], step):
            yield np.array(self.view[start : start + step], dtype=np.float32)

    def split(self, parts: int) -> list[TensorRef]:
        """Equal parts along the first axis (a fused weight)."""
        return [TensorRef(self.name, v) for v in np.split(self.view, parts)]

    @property
    def T(self) -> TensorRef:
        return TensorRef(self.name, self.view.T)


class Checkpoint:
    """The checkpoint's files, with tensor names in one canonical spelling.

    Args:
        folder: holds config.json and one or several .safetensors files.
        renames: (pattern, replacement) pairs applied in order to every stored name, so that one
            architecture file reads what several versions of transformers wrote.

    Raises:
        CheckpointMissing: no folder, no config.json, no safetensors, or one that is truncated.
    """

    def __init__(self, folder: Path, renames: Sequence[tuple[str, str]] = ()) -> None:
        if not folder.is_dir():
            raise CheckpointMissing(folder, "there is no such folder")
        self.folder = folder
        self.config = Config(read_json(folder / "config.json"))
        self._renames = [(re.compile(pattern), new) for pattern, new in renames]
        self._refs: dict[str, TensorRef] = {}
        self._other: dict[str, str] = {}  # dtype of the tensors that are no floats
        self._digest = hashlib.sha256((folder / "config.json").read_bytes())
        for path in self.files():
            self._open(path)

    def digest(self) -> str:
        """sha256 of config.json and of every safetensors header (names, shapes, offsets)."""
        return self._digest.hexdigest()

    def dtype(self) -> str:
        """The dtype most tensors are stored in."""
        names = [ref.view.dtype.name for ref in self._refs.values()]
        return max(sorted(set(names)), key=names.count)

    def __contains__(self, name: str) -> bool:
        return name in self._refs

    def tensor(self, name: str, shape: Sequence[int]) -> TensorRef:
        """The tensor of this canonical name.

        Raises:
            TensorMissing, TensorShapeMismatch: absent, or not of `shape`.
            UnsupportedConfig: it is stored in a dtype that is no float (quantized already).
        """
        ref = self._refs.get(name)
        if name in self._other:
            raise UnsupportedConfig(
                name,
                self._other[name],
                f"weights are read in {', '.join(DTYPES)}; export the original",
            )
        if ref is None:
            raise TensorMissing(name, self.folder.name)
        if ref.shape != tuple(shape):
            raise TensorShapeMismatch(ref.name, ref.shape, shape)
        return ref

    def files(self) -> list[Path]:
        """The weight files.

        Raises:
            CheckpointMissing: there are none, or one is absent.
        """
        index = self.folder / "model.safetensors.index.json"
        if (single := self.folder / "model.safetensors").is_file():  # as transformers looks
            paths = [single]
        elif index.is_file():
            paths = [self.folder / name for name in indexed_files(index)]
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
        if not paths and any(self.folder.glob("*.bin")):
            raise CheckpointMissing(
                self.folder,
                "it holds .bin weights only; save it once more with transformers, which writes safetensors",
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing or not paths:
            what = ", ".join(missing) or "no .safetensors file"
            raise CheckpointMissing(
                self.folder,
                f"{what} {'is missing' if missing else 'there'}; download the whole checkpoint",
            )
        return paths

    def _open(self, path: Path) -> None:
        # The format (8 bytes of header length, JSON header, data) is read here rather than by the
        # safetensors package because its readers copy; a view of the mapped file does not.
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointMissing(self.folder, f"{path.name} is truncated; download it again")
            raw = file.read(length)
        try:
            header = _header(raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointMissing(
                self.folder, f"{path.name} is not a safetensors file"
            ) from error
        self._digest.update(raw)
        data = 8 + length
        if max((end for *_, end in header.values()), default=0) + data > size:
            raise CheckpointMissing(self.folder, f"{path.name} is truncated; download it again")
        mapped = np.memmap(path, mode="r", dtype=np.uint8) if size > data else np.empty(0, np.uint8)
        for stored, (kind, shape, begin, end) in header.items():
            name = stored
            for pattern, new in self._renames:
                name = pattern.sub(new, name)
            dtype = DTYPES.get(kind)
            if dtype is None:
                self._other[name] = (
                    kind  # an integer buffer (position_ids), unless a layer asks for it
                )
                continue
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise CheckpointMissing(
                    self.folder,
                    f"{path.name} is damaged: {stored} has {end - begin} bytes for shape {list(shape)}",
                )
            view = mapped[data + begin : data + end].view(dtype).reshape(shape)
            if name in self._refs:
                raise CheckpointMissing(
                    self.folder, f"tensors {self._refs[name].name} and {stored} are the same one"
                )
            self._refs[name] = TensorRef(stored, view)


def _header(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """A safetensors header: stored name -> dtype, shape, where its data begins and ends.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is something else.
    """
    header = json.loads(raw)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not counts or not isinstance(kind, str):
            raise ValueError(f"{name} is no tensor")
        found[name] = (kind, shape, begin, end)
    return found


def indexed_files(index: Path) -> list[str]:
    """The weight files that a model.safetensors.index.json names, each once.

    Raises:
        CheckpointMissing: it names none.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointMissing(index.parent, f"{index.name} has no weight_map of file names")
    return sorted(set(names.values()))


@dataclass(frozen=True)
class Weights:
    """A checkpoint seen from one module: names are relative to `path`."""

    checkpoint: Checkpoint
    path: str = ""

    def sub(self, name: str | int) -> Weights:
        return Weights(self.checkpoint, self.name(str(name)))

    def name(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        return self.name(name) in self.checkpoint

    def tensor(self, name: str, *shape: int) -> TensorRef:
        return self.checkpoint.tensor(self.name(name), shape)


def refuse_quantized(config: Config) -> None:
    """A checkpoint that is quantized already has no float weights to read.

    Raises:
        UnsupportedConfig: config.json has a quantization_config.
    """
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", found) if isinstance(found, dict) else found
        raise UnsupportedConfig(
            "quantization_config",
            method,
            "export the original float checkpoint; vlm-edge quantizes it",
        )
