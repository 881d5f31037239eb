"""What a model is calibrated on: pictures, questions about them and texts; the user's or the built-in.

A folder holds pictures and, if wanted, `prompts.jsonl` ({"image": file name, "prompt": text} a line)
and `texts.txt` (a text a line).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from vlm_edge.errors import CalibrationError, ImageError
from vlm_edge.runtime.images import decode

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
FEWEST = 4  # below this the ranges would be an accident, and nothing could be held out
MOST = 128  # more change ranges little and cost time; taken evenly from the sorted folder
HOLD_OUT = 4  # every so-many-th item measures the error and sets nothing
QUESTION = "Describe the image."  # for pictures without a prompt


@dataclass(frozen=True)
class Prompt:
    """A text, and the picture it is about (index into `CalibrationSet.paths`) if any."""

    picture: int | None
    text: str


@dataclass(frozen=True)
class CalibrationSet:
    """Paths of readable pictures, prompts, and the sha256 of all contents in order."""

    paths: tuple[Path, ...]
    prompts: tuple[Prompt, ...]
    sha256: str

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the pictures that measure the error."""
        return tuple(range(HOLD_OUT - 1, len(self.paths), HOLD_OUT))

    @property
    def held_out_prompts(self) -> tuple[int, ...]:
        """Indices of the prompts that measure the error."""
        return tuple(range(HOLD_OUT - 1, len(self.prompts), HOLD_OUT))


def load(folder: Path | None) -> CalibrationSet:
    """The pictures of `folder` (not of folders below it) with its prompts, or the built-in ones.

    Raises:
        CalibrationError: no such folder, fewer than FEWEST pictures, one that cannot be read, or a
            prompt that names no picture of the folder.
    """
    if folder is None:
        with as_file(files("vlm_edge.export") / "demo_data" / "calibration") as built_in:
            return _read(built_in)
    if not folder.is_dir():
        raise CalibrationError(f"there is no calibration folder {folder}")
    return _read(folder)


def _read(folder: Path) -> CalibrationSet:
    every = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(every) < FEWEST:
        raise CalibrationError(
            f"calibration folder {folder} has {len(every)} picture(s); at least {FEWEST} are needed"
        )
    paths = every
    if len(every) > MOST:
        paths = [every[i * len(every) // MOST] for i in range(MOST)]
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(bytes.fromhex(decode(path).digest))
        except ImageError as error:
            raise CalibrationError(f"calibration picture unusable: {error}") from error
    prompts = [*_questions(folder, paths, every), *(Prompt(None, text) for text in _texts(folder))]
    if len(prompts) < FEWEST:
        raise CalibrationError(
            f"calibration folder {folder} has {len(prompts)} prompt(s) in prompts.jsonl and texts.txt; "
            f"at least {FEWEST} are needed, or neither file"
        )
    digest.update(json.dumps([[p.picture, p.text] for p in prompts]).encode())
    return CalibrationSet(tuple(paths), tuple(prompts), digest.hexdigest())


def _questions(folder: Path, paths: list[Path], every: list[Path]) -> list[Prompt]:
    file = folder / "prompts.jsonl"
    if not file.is_file():
        return [Prompt(index, QUESTION) for index in range(len(paths))]
    index = {path.name: i for i, path in enumerate(paths)}
    known = {path.name for path in every}
    prompts = []
    for number, line in enumerate(_lines(file), 1):
        try:
            entry: Any = json.loads(line)
            name, text = entry["image"], entry["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f'{file.name} line {number} is not {{"image": ..., "prompt": ...}}'
            ) from error
        if name not in known or not isinstance(text, str) or not text.strip():
            raise CalibrationError(
                f"{file.name} line {number} names no picture of {folder}, or no text"
            )
        if name in index:  # a large folder is thinned out
            prompts.append(Prompt(index[name], text))
    return prompts


def _texts(folder: Path) -> list[str]:
    file = folder / "texts.txt"
    return _lines(file) if file.is_file() else []


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file} cannot be read: {error}") from error
