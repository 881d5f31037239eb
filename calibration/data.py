"""What a model is calibrated on: pictures, questions about them and texts; the user's or the built-in.

A model that tiles also gets the built-in large pictures, one of every shape, and where all would be too
many tiles, each of its tilings is kept once at least and sets something.

A folder holds pictures and, if wanted, `prompts.jsonl` ({"image": file name, "prompt": text} a line, or
{"images": [file names], "prompt": text}) and `texts.txt` (a text a line), both UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

from vlm_edge.errors import CalibrationError, ImageError
from vlm_edge.runtime.images import decode
from vlm_edge.runtime.tiling.plan import Tiler

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
FEWEST = 4  # below this the ranges would be an accident, and nothing could be held out
MOST = 128  # more change ranges little and cost time; taken evenly from the sorted folder
HOLD_OUT = 4  # every so-many-th item measures the error and sets nothing
LARGE = "large"  # folder of the built-in pictures for models that tile
QUESTION = "Describe the image."  # for pictures without a prompt
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A text, and the pictures it is about, in order (indices into `CalibrationSet.paths`)."""

    pictures: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class CalibrationSet:
    """Paths of readable pictures, their (width, height) in pixels, prompts, and the sha256 of all
    contents in order."""

    paths: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    prompts: tuple[Prompt, ...]
    sha256: str

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the pictures that measure the error."""
        return tuple(range(HOLD_OUT - 1, len(self.paths), HOLD_OUT))

    def within(self, tiler: Tiler, most: int) -> CalibrationSet:
        """As many pictures as have `most` tiles together (`FEWEST` at least), with the prompts that need no
        others: the last one of each tiling, where the large pictures are, and the rest taken evenly.

        Each of these sets something: pictures change places where it would be held out. Where every
        picture is tiled alike and there is room, nothing changes.
        """
        plans = [tiler.plan(*size) for size in self.sizes]
        tiles = [plan.tiles for plan in plans]
        last = {plan.name: index for index, plan in enumerate(plans)}
        shown: list[int] = []
        for index in sorted(last.values(), key=tiles.__getitem__) if len(last) > 1 else ():
            # What is held out needs room too.
            if sum(tiles[i] for i in (*shown, index)) <= most * (HOLD_OUT - 1) // HOLD_OUT:
                shown.append(index)
        room = most - sum(tiles[i] for i in shown)
        rest = [index for index in range(len(plans)) if index not in shown]
        count = len(rest)
        fewest = max(0, FEWEST - len(shown))
        while count > fewest and sum(tiles[i] for i in evenly(rest, count)) > room:
            count -= 1
        return self._only(_setting(shown, evenly(rest, count)))

    def _only(self, kept: Sequence[int]) -> CalibrationSet:
        """Some of the pictures, in this order, with the prompts that need no others."""
        if list(kept) == list(range(len(self.paths))):
            return self
        index = {old: new for new, old in enumerate(kept)}
        prompts = tuple(
            Prompt(tuple(index[i] for i in prompt.pictures), prompt.text)
            for prompt in self.prompts
            if all(i in index for i in prompt.pictures)
        )
        return replace(
            self,
            paths=tuple(self.paths[i] for i in kept),
            sizes=tuple(self.sizes[i] for i in kept),
            prompts=prompts,
        )

    @property
    def held_out_prompts(self) -> tuple[int, ...]:
        """Indices of the prompts that measure the error."""
        return tuple(range(HOLD_OUT - 1, len(self.prompts), HOLD_OUT))


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many, at equal distances."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def _setting(shown: Sequence[int], rest: Sequence[int]) -> list[int]:
    """Both, in the order of the rest, with what must be `shown` in places that are not held out."""
    order: list[int] = []
    waiting, others = list(shown), list(rest)
    while waiting or others:
        held_out = len(order) % HOLD_OUT == HOLD_OUT - 1
        take = others if others and (held_out or not waiting) else waiting
        order.append(take.pop(0))
    return order


def load(folder: Path | None, large: bool = False) -> CalibrationSet:
    """The pictures of `folder` (not of folders below it) with its prompts, or the built-in ones.

    Args:
        large: with the large ones among the built-in: for models that tile.

    Raises:
        CalibrationError: no such folder, one that cannot be read, fewer than FEWEST pictures, one that
            cannot be read, or a prompt that names no picture of the folder.
    """
    if folder is None:
        with as_file(files("vlm_edge.export") / "demo_data" / "calibration") as built_in:
            data = _read(built_in)
            return _joined(data, _read(built_in / LARGE)) if large else data
    if folder.exists() and not folder.is_dir():
        raise CalibrationError(
            f"calibration takes a folder of pictures; {folder} is a file: give the folder it is in"
        )
    if not folder.is_dir():
        raise CalibrationError(f"there is no calibration folder {folder}")
    return _read(folder)


def _read(folder: Path) -> CalibrationSet:
    every = _pictures(folder)
    paths = evenly(every, MOST)
    digest, sizes = hashlib.sha256(), []
    for path in paths:
        try:
            decoded = decode(path)
        except ImageError as error:
            raise CalibrationError(
                f"calibration picture unusable: {error}; repair it or take it out"
            ) from error
        digest.update(bytes.fromhex(decoded.digest))
        sizes.append(decoded.image.size)
    prompts = [*_questions(folder, paths, every), *(Prompt((), text) for text in _texts(folder))]
    if len(prompts) < FEWEST:
        raise CalibrationError(
            f"calibration folder {folder} has {len(prompts)} prompt(s) in prompts.jsonl and texts.txt; "
            f"at least {FEWEST} are needed, or neither file"
        )
    digest.update(json.dumps([[p.pictures, p.text] for p in prompts]).encode())
    return CalibrationSet(tuple(paths), tuple(sizes), tuple(prompts), digest.hexdigest())


def _joined(first: CalibrationSet, second: CalibrationSet) -> CalibrationSet:
    count = len(first.paths)
    prompts = tuple(
        Prompt(tuple(count + index for index in prompt.pictures), prompt.text)
        for prompt in second.prompts
    )
    return CalibrationSet(
        first.paths + second.paths,
        first.sizes + second.sizes,
        first.prompts + prompts,
        hashlib.sha256(bytes.fromhex(first.sha256 + second.sha256)).hexdigest(),
    )


def _pictures(folder: Path) -> list[Path]:
    """The pictures of `folder` by name, FEWEST at least."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CalibrationError(
            f"calibration folder {folder} cannot be read: {error.strerror}"
        ) from error
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        what = f"{len(files)} file(s) but no picture" if files else "no file"
        raise CalibrationError(
            f"calibration folder {folder} has {what}; put at least {FEWEST} pictures there "
            f"({' '.join(sorted(SUFFIXES))})"
        )
    if len(found) < FEWEST:
        raise CalibrationError(
            f"calibration folder {folder} has {len(found)} picture(s); at least {FEWEST} are needed"
        )
    return found


def _questions(folder: Path, paths: list[Path], every: list[Path]) -> list[Prompt]:
    file = folder / "prompts.jsonl"
    if not file.is_file():
        return [Prompt((index,), QUESTION) for index in range(len(paths))]
    index = {path.name: i for i, path in enumerate(paths)}
    known = {path.name for path in every}
    prompts = []
    for number, line in enumerate(_lines(file), 1):
        try:
            entry: Any = json.loads(line)
            names = entry["images"] if "images" in entry else [entry["image"]]
            text = entry["prompt"]
            str(text).encode()  # half a surrogate pair is valid JSON and no text
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f'{file.name} line {number} is not {{"image": ..., "prompt": ...}}'
            ) from error
        pictures = names if isinstance(names, list) else []
        if not pictures or not all(isinstance(n, str) and n in known for n in pictures):
            raise CalibrationError(f"{file.name} line {number} names no picture of {folder}")
        if not isinstance(text, str) or not text.strip():
            raise CalibrationError(f"{file.name} line {number} has no text")
        if all(name in index for name in pictures):  # a large folder is thinned out
            prompts.append(Prompt(tuple(index[name] for name in pictures), text))
    return prompts


def _texts(folder: Path) -> list[str]:
    file = folder / "texts.txt"
    return _lines(file) if file.is_file() else []


def _lines(file: Path) -> list[str]:
    """Lines that are not empty; a byte order mark is no part of the first."""
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from error
