"""TensorRT plans in a folder beside the bundle, each under all that it depends on.

A plan runs on the GPU generation, TensorRT version and platform it was built for and nowhere else, so
it is never part of a bundle. A miss says which field changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_edge.errors import PlanDamaged, PlanMismatch, PlanMissing
from vlm_edge.runtime.bundle import file_digest
from vlm_edge.runtime.manifest import EngineEntry, FileEntry
from vlm_edge.runtime.schema import SchemaError, from_json, to_json

FORMAT = 1
LOWERING = 1  # raised when vlm-edge makes other graphs for TensorRT of the same bundle
FloatType = Literal["float16", "float32"]


@dataclass(frozen=True)
class PlanProfile:
    """What an engine has room for.

    Attributes:
        float_type: of what is not quantized.
        capacity: positions of the cache; of an encoder-decoder's prompt, too.
        chunk: positions of one prefill call at most.
        tiles: tiles of one vision or connector call at most.
        words: tokens of an instruction that the connector reads.
        media: positions of all pictures that a prompt's tokens attend to.
    """

    float_type: FloatType
    capacity: int
    chunk: int
    tiles: int = 1
    words: int = 0
    media: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in to_json(self).items() if value)


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on.

    Attributes:
        tensorrt: "tensorrt 10.3.0" or "tensorrt-rtx 1.7.1.116".
        compute_capability: "8.6".
        platform: "linux-x86_64".
        graph: sha256 of the portable graph and its weights (`graph_digest`).
        profile: None in a search takes whatever was built last.
        lowering: how this package makes TensorRT's graph of it.
    """

    tensorrt: str
    compute_capability: str
    platform: str
    graph: str
    profile: PlanProfile | None
    lowering: int = LOWERING

    def digest(self) -> str:
        """Hex digits that name the plan's files."""
        text = json.dumps(to_json(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differs(self, wanted: PlanKey) -> dict[str, tuple[str, str]]:
        """By field that differs: what this key has and what is wanted."""
        found = {}
        for field in dataclasses.fields(self):
            has, needed = getattr(self, field.name), getattr(wanted, field.name)
            if has != needed and not (field.name == "profile" and needed is None):
                found[field.name] = (_shown(has), _shown(needed))
        return found


@dataclass(frozen=True)
class PlanEntry:
    """What stands beside a plan's file.

    Attributes:
        built: when it was built or last asked for again, nanoseconds since 1970.
        seconds: that building took.
    """

    format: int
    engine: str
    key: PlanKey
    file: FileEntry
    built: int
    seconds: float


class PlanStore:
    """A folder of plans: `<engine>-<digest>.plan`, with a `.json` beside each.

    The `.json` is written last, so a plan that was cut short does not count as one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @staticmethod
    def beside(bundle: Path) -> PlanStore:
        """The folder where a bundle's plans are, unless another is named."""
        whole = bundle.resolve()
        return PlanStore(whole.with_name(f"{whole.name}.plans"))

    def entries(self, engine: str) -> list[PlanEntry]:
        """All plans of an engine, the latest first.

        Raises:
            PlanDamaged: a `.json` is not what `add` writes.
        """
        found = [_read(path) for path in self.folder.glob(f"{engine}-*.json")]
        return sorted((entry for entry in found if entry.engine == engine), key=lambda e: -e.built)

    def nearest(self, engine: str, key: PlanKey) -> PlanEntry | None:
        """The plan whose key differs least, the latest of several; None where there is none.

        Raises:
            PlanDamaged: a `.json` is not what `add` writes.
        """
        found = self.entries(engine)
        return min(found, key=lambda entry: len(entry.key.differs(key)), default=None)

    def find(self, engine: str, key: PlanKey, command: str, check: bool = True) -> PlanEntry:
        """The latest plan that fits.

        Args:
            command: the `vlm build` that a miss recommends.
            check: compare the file with its sha256.

        Raises:
            PlanMissing: none of this engine is there.
            PlanMismatch: none fits; the sentence names what differs from the nearest.
            PlanDamaged: the one that fits is cut short or changed.
        """
        nearest = self.nearest(engine, key)
        if nearest is None:
            raise PlanMissing(engine, self.folder, command)
        differs = nearest.key.differs(key)
        if differs:
            raise PlanMismatch(engine, self.folder, differs, command)
        self.check(nearest, check)
        return nearest

    def path(self, entry: PlanEntry) -> Path:
        """The plan's file."""
        return self.folder / f"{entry.engine}-{entry.key.digest()}.plan"

    def add(self, engine: str, key: PlanKey, plan: Path, seconds: float) -> PlanEntry:
        """Move a finished plan into the folder; one of the same key is replaced.

        Args:
            plan: a file in `self.folder`, so that moving it is one step.
        """
        stat = plan.stat()
        file = FileEntry(stat.st_size, file_digest(plan))
        entry = PlanEntry(FORMAT, engine, key, file, stat.st_mtime_ns, seconds)
        path = self.path(entry)
        path.with_suffix(".json").unlink(missing_ok=True)  # it speaks of the plan that is replaced
        plan.replace(path)
        _write(path.with_suffix(".json"), to_json(entry))
        return entry

    def prefer(self, entry: PlanEntry) -> PlanEntry:
        """Make a plan the latest, which a search without a profile takes."""
        latest = dataclasses.replace(entry, built=time.time_ns())
        _write(self.path(latest).with_suffix(".json"), to_json(latest))
        return latest

    def check(self, entry: PlanEntry, digest: bool = True) -> None:
        """Compare a plan's file with its size and, with `digest`, its sha256.

        Raises:
            PlanDamaged: it is missing, cut short or changed.
        """
        path = self.path(entry)
        if not path.is_file():
            raise PlanDamaged(path, "it is missing")
        if path.stat().st_size != entry.file.size:
            raise PlanDamaged(path, f"{path.stat().st_size} bytes instead of {entry.file.size}")
        if digest and file_digest(path) != entry.file.sha256:
            raise PlanDamaged(path, "it differs from its sha256")


def host_platform() -> str:
    """`PlanKey.platform` of this machine."""
    return f"{sys.platform}-{platform.machine().lower()}"


def graph_digest(entry: EngineEntry, files: Mapping[str, FileEntry]) -> str:
    """sha256 over the digests of an engine's portable graph and weights, as the manifest lists them."""
    names = (entry.graph, f"{entry.graph.removesuffix('.onnx')}.data")
    listed = [files[name].sha256 for name in names if name in files]
    return hashlib.sha256(" ".join(listed).encode()).hexdigest()


def _shown(value: Any) -> str:
    """A digest shortened; all else as it is."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def _read(path: Path) -> PlanEntry:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise PlanDamaged(path, f"this version reads format {FORMAT}")
        return from_json(PlanEntry, found)
    except (OSError, ValueError, SchemaError) as error:
        raise PlanDamaged(path, " ".join(str(error).split())) from error


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Whole or not at all; another process may be writing the same."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(document, indent=1), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # the disk was full
