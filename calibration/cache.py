"""What a float run found, kept between exports: ranges and outputs, by the hash of all that made them.

An entry is a folder `<key>` of three files; `entry.json` holds the hashes of the other two, so that a
damaged or half-written entry is seen and computed again. Entries are bounded in all; the one that
was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlm_edge.calibration.ranges import METHODS, Ranges
from vlm_edge.runtime.bundle import file_digest

log = logging.getLogger(__name__)

# The code that makes ranges of a run's outputs and stores them: another version has other entries.
CODE = tuple(Path(__file__).with_name(name) for name in ("cache.py", "histogram.py", "ranges.py"))
MOST_BYTES = 1 << 30  # of all entries together: about fourteen encoders of 32 pictures at 336 px
OUTPUTS, RANGES, ENTRY = "outputs.npy", "ranges.npz", "entry.json"


def root() -> Path:
    """Where entries are kept: beside the demo checkpoint, below XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vlm-edge" / "calibration"


def key(files: Mapping[str, Path], inputs: np.ndarray, **settings: object) -> str:
    """The hash of everything that decides what a float run finds.

    Args:
        files: the graph and its weights as they are run, by name.
        inputs: what is fed to it, of any shape; read piece by piece.
        settings: whatever else matters, as JSON.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, path in (*((path.name, path) for path in CODE), *sorted(files.items())):
        digest.update(f"{name} {file_digest(path)}\n".encode())
    digest.update(f"{inputs.dtype} {inputs.shape}\n".encode())
    for row in inputs:
        digest.update(np.ascontiguousarray(row).data)
    return digest.hexdigest()


def load(key: str) -> tuple[Ranges, np.ndarray] | None:
    """The ranges and the outputs (memory-mapped) kept under `key`; None where there are none, or where
    they are damaged, and then they are removed."""
    folder = root() / key
    if not folder.is_dir():
        return None
    try:
        expected = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        if expected != {name: file_digest(folder / name) for name in (OUTPUTS, RANGES)}:
            raise ValueError("the files are not those that were written")
        ranges = _read_ranges(folder / RANGES)
        outputs = np.load(folder / OUTPUTS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError) as error:
        log.debug("calibration cache entry %s is damaged (%s); computed again", key[:12], error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    _touch(folder)
    return ranges, outputs


def keep(key: str, ranges: Ranges, outputs: np.ndarray) -> None:
    """Keep a run's results. A cache that cannot be written, or has no room for them, is left alone."""
    if outputs.nbytes > MOST_BYTES:
        return
    draft = None
    try:
        root().mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".", dir=root()))
        np.save(draft / OUTPUTS, outputs)
        _write_ranges(draft / RANGES, ranges)
        digests = {name: file_digest(draft / name) for name in (OUTPUTS, RANGES)}
        (draft / ENTRY).write_text(json.dumps(digests), encoding="utf-8")
        draft.rename(root() / key)
        _evict(root() / key)
    except OSError as error:  # no room, no permission, or another process kept the same first
        log.debug("calibration results are not kept: %s", error)
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _write_ranges(path: Path, ranges: Ranges) -> None:
    paths = sorted(ranges.channels)
    limits = np.array([[ranges.limits[method][p] for p in paths] for method in METHODS])
    channels = {f"channels.{p}": ranges.channels[p] for p in paths}
    np.savez(path, limits=limits, **channels)  # type: ignore[arg-type]  # names are not its options


def _read_ranges(path: Path) -> Ranges:
    with np.load(path, allow_pickle=False) as stored:
        paths = [n.removeprefix("channels.") for n in stored.files if n.startswith("channels.")]
        rows = dict(zip(METHODS, stored["limits"].tolist(), strict=True))
        return Ranges(
            {method: dict(zip(paths, row, strict=True)) for method, row in rows.items()},
            {p: stored[f"channels.{p}"] for p in paths},
        )


def _evict(newest: Path) -> None:
    """Remove the entries that were not used for longest until the rest fits; `newest` stays."""
    entries = [path for path in root().iterdir() if path.is_dir()]  # drafts left behind, too
    entries.sort(key=lambda path: (path == newest, path.stat().st_mtime), reverse=True)
    size = 0
    for path in entries:
        size += sum(file.stat().st_size for file in path.iterdir())
        if size > MOST_BYTES and path != newest:
            shutil.rmtree(path, ignore_errors=True)


def _touch(folder: Path) -> None:
    try:
        os.utime(folder)
    except OSError:  # a cache that may only be read
        return
