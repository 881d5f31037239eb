"""Our preprocessing beside the checkpoint's own processor, both with Pillow, on tiled pictures.

The two take turns on the same picture in one process, so that whatever else the machine does meets
both; the first turn is a warm-up. Settings are those of the published checkpoints, the picture is noise
(its content changes no time). What both make is compared before it is timed.

    python -m vlm_edge.benchmarks.preprocessing
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlm_edge.benchmarks.machine import describe
from vlm_edge.errors import VlmEdgeError
from vlm_edge.runtime.manifest import ImageSettings, Resize
from vlm_edge.runtime.preprocess import preprocess
from vlm_edge.runtime.tiling import AnyRes, Split, Tiler, Tiling, tiler

# class of transformers, its options: llava-hf/llava-v1.6-*, HuggingFaceTB/SmolVLM-*-Instruct
NEXT = (
    "LlavaNextImageProcessorPil",
    {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    },
)
SMOLVLM = (
    "SmolVLMImageProcessorPil",
    {
        "size": {"longest_edge": 2048},
        "max_image_size": {"longest_edge": 512},
    },
)
# name, processor, width and height of the picture
SUBJECTS: tuple[tuple[str, tuple[str, dict[str, Any]], tuple[int, int]], ...] = (
    ("LLaVA-NeXT", NEXT, (672, 672)),
    ("LLaVA-NeXT", NEXT, (4000, 3000)),
    ("SmolVLM", SMOLVLM, (1024, 768)),
)


@dataclass(frozen=True)
class Measured:
    """Milliseconds of every turn, ours and the processor's."""

    tiles: int
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times as long the processor takes, turn by turn; the median."""
        return median(b / a for a, b in zip(self.ours, self.theirs, strict=True))


@click.command()
@click.option(
    "--runs", type=click.IntRange(1), default=15, show_default=True, help="Turns of each."
)
def main(runs: int) -> None:
    """Time preprocessing beside transformers' processors."""
    table = Table(title=f"preprocessing, median of {runs}", caption=describe()["name"])
    for column in ("processor", "picture", "tiles", "ours, ms", "processor's, ms", "ratio"):
        table.add_column(column, justify="left" if column == "processor" else "right")
    for name, (kind, options), (width, height) in SUBJECTS:
        found = compare(kind, options, width, height, runs)
        table.add_row(
            name, f"{width}x{height}", str(found.tiles), f"{median(found.ours):.1f}",
            f"{median(found.theirs):.1f}", f"{found.ratio:.2f}",
        )  # fmt: skip
    Console().print(table)


def compare(kind: str, options: dict[str, Any], width: int, height: int, runs: int) -> Measured:
    """Both on one picture of that size, in turn.

    Args:
        kind: class in transformers.
        options: its arguments.

    Raises:
        VlmEdgeError: the two make different pixels.
    """
    import transformers

    theirs = getattr(transformers, kind)(**options)
    image, cut = _settings(theirs)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    picture = Image.fromarray(pixels)

    def ours() -> np.ndarray:
        return preprocess(picture, image, cut.plan(width, height).sheets)

    found, expected = ours(), np.asarray(theirs(picture)["pixel_values"])
    if not np.array_equal(found.ravel(), expected.ravel()):
        raise VlmEdgeError(f"{kind} makes other pixels of a {width}x{height} picture")
    turns = [(_ms(ours), _ms(lambda: theirs(picture))) for _ in range(runs)]
    return Measured(len(found), [mine for mine, _ in turns], [other for _, other in turns])


def _settings(theirs: Any) -> tuple[ImageSettings, Tiler]:
    """What a bundle of the processor's checkpoint would say; tokens and their spelling take no part."""
    resample: Any = Image.Resampling(theirs.resample).name.lower()
    pinpoints = getattr(theirs, "image_grid_pinpoints", None)
    side = theirs.max_image_size["longest_edge"] if pinpoints is None else theirs.crop_size.height
    mean, std = tuple(theirs.image_mean), tuple(theirs.image_std)
    resize = Resize("exact", side, side, resample)
    image = ImageSettings(None, resize, None, theirs.rescale_factor, mean, std, side, side)
    if pinpoints is None:
        tiling: Tiling = Split("split", 1, theirs.size.longest_edge, True, resample, "", "")
    else:
        sizes = tuple((height, width) for height, width in pinpoints)
        tiling = AnyRes("anyres", (1, 1), sizes, (side, side), resample, "")
    return image, tiler(tiling, (side, side))


def _ms(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
