"""Pictures whose activations set the INT8 ranges: a folder of the user's, or the built-in set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from vlm_edge.errors import CalibrationError, ImageError
from vlm_edge.runtime.images import decode

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
FEWEST = 4  # below this the ranges would be an accident, and nothing could be held out
MOST = 128  # more change ranges little and cost time; taken evenly from the sorted folder
HOLD_OUT = 4  # every so-many-th picture measures the error and sets no range


@dataclass(frozen=True)
class CalibrationSet:
    """Paths of readable pictures, and the sha256 of their contents in order."""

    paths: tuple[Path, ...]
    sha256: str

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the pictures that measure the error."""
        return tuple(range(HOLD_OUT - 1, len(self.paths), HOLD_OUT))


def load(folder: Path | None) -> CalibrationSet:
    """The pictures of `folder` (not of folders below it), or the built-in ones.

    Raises:
        CalibrationError: no such folder, fewer than FEWEST pictures, or one that cannot be read.
    """
    if folder is None:
        with as_file(files("vlm_edge.export") / "demo_data" / "calibration") as built_in:
            return _read(built_in)
    if not folder.is_dir():
        raise CalibrationError(f"there is no calibration folder {folder}")
    return _read(folder)


def _read(folder: Path) -> CalibrationSet:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(paths) < FEWEST:
        raise CalibrationError(
            f"calibration folder {folder} has {len(paths)} picture(s); at least {FEWEST} are needed"
        )
    if len(paths) > MOST:
        paths = [paths[i * len(paths) // MOST] for i in range(MOST)]
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(bytes.fromhex(decode(path).digest))
        except ImageError as error:
            raise CalibrationError(f"calibration picture unusable: {error}") from error
    return CalibrationSet(tuple(paths), digest.hexdigest())
