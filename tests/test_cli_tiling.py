"""What the command line says of tiling: counts and a drawing from settings alone, limits, the choice made."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_edge.cli.main import cli
from vlm_edge.cli.tiling import every
from vlm_edge.export.pipeline import export
from vlm_edge.export.tiling import OverlapOrder
from vlm_edge.runtime.manifest import ImageSettings, Resize, read_manifest
from vlm_edge.runtime.preprocess import preprocess
from vlm_edge.runtime.tiling import AnyRes, Overlap, SingleTile, Split, Tiling, tiler
from vlm_edge.runtime.tiling.draw import OVERLAP, PADDING, WIDTH, draw

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
CROPPED = ImageSettings(
    None, Resize("shortest_edge", 336, 336, "bicubic"), (336, 336), 1 / 255, None, None, 336, 336
)
KINDS: dict[str, tuple[Tiling, int]] = {  # and the side of a tile
    "single": (SingleTile("single", 576), 336),
    "anyres": (AnyRes("anyres", (24, 24), PINPOINTS, (336, 336), "bicubic", "image_newline.npy"), 336),
    "overlap": (Overlap("overlap", (24, 24), (2, 2), (6, 6), "crop", "bicubic"), 336),
    "split": (Split("split", 64, 2048, True, "lanczos", "<fake>", "<global-img>"), 512),
}  # fmt: skip


def vlm(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, args)))


# -- the drawing ------------------------------------------------------------------------------


def test_a_drawing() -> None:
    settings, side = KINDS["anyres"]
    plan = tiler(settings, (side, side)).plan(640, 400)
    assert draw(plan, CROPPED).splitlines() == [
        "┌───────────────┐   ┌───────────────┬───────────────┐",
        "│               │   │╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│",
        "│               │   │╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│",
        "│               │   │╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│",
        "│       1       │   │       2       │       3       │",
        "│               │   │               │               │",
        "│               │   │               │               │",
        "│               │   │               │               │",
        "└───────────────┘   ├───────────────┼───────────────┤",
        "                    │               │               │",
        "                    │               │               │",
        "                    │               │               │",
        "                    │       4       │       5       │",
        "                    │╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│",
        "                    │╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│",
        "                    │╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱│",
        "                    └───────────────┴───────────────┘",
        "  1  overview of 336x336 pixels: the picture scaled to 336x336",
        "2-5  2x2 tiles of 336x336 pixels: the picture scaled to 672x420 on 672x672",
        " ╱╱  padding",
    ]


@pytest.mark.parametrize("kind", KINDS)
@given(width=st.integers(20, 5000), height=st.integers(20, 5000))
def test_every_tile_is_drawn(kind: str, width: int, height: int) -> None:
    """Numbered in order, whatever the size, with marks where there is something to mark."""
    settings, side = KINDS[kind]
    plan = tiler(settings, (side, side)).plan(width, height)
    shown = draw(plan, dataclasses.replace(CROPPED, height=side, width=side))
    lines = shown.splitlines()
    boxes = [line for line in lines if line.lstrip()[0] in "┌│├└"]
    assert max(map(len, boxes)) <= WIDTH
    numbers = [int(number) for number in re.findall(r"\d+", "\n".join(boxes))]
    assert sorted(numbers) == list(range(1, plan.tiles + 1))
    inside = "".join(boxes)
    padded = any(s is not None and s.scaled[-1] != s.canvas for s in plan.sheets)
    assert padded or PADDING not in inside
    for sheet in plan.sheets:  # more than a character of padding is seen
        if sheet is not None and max(sheet.offset) > 60:
            assert PADDING in inside
    assert (OVERLAP in inside) == (kind == "overlap")
    detail = next((s for s in plan.sheets if s is not None and s.tiles != (1, 1)), None)
    if detail is not None:
        assert f"{plan.name} tiles" in shown
        assert f"scaled to {detail.scaled[-1][1]}x{detail.scaled[-1][0]}" in shown


@pytest.mark.parametrize("overlap", [1, 2, 12, 23])
@pytest.mark.parametrize("tiles", [(2, 2), (3, 4), (1, 2), (4, 1)])
def test_overlaps_are_seen_however_narrow(overlap: int, tiles: tuple[int, int]) -> None:
    settings = Overlap("overlap", (24, 24), tiles, (overlap, overlap), "crop", "bicubic")
    plan = tiler(settings, (336, 336)).plan(900, 900)
    shown = draw(plan, CROPPED)
    assert OVERLAP in shown.split("overview of")[0]
    assert f"neighbours share {overlap * 14}x{overlap * 14}" in shown


@pytest.mark.parametrize(
    ("image", "size", "said", "padding"),
    [
        (CROPPED, (640, 480), "scaled to 448x336, 112 of its columns cut off", False),
        (CROPPED, (480, 640), "scaled to 336x448, 112 of its rows cut off", False),
        (dataclasses.replace(CROPPED, pad_to_square=(0, 0, 0)), (640, 480), "336x252 on 336x336", True),
        (dataclasses.replace(CROPPED, resize=None), (300, 200), "scaled to 300x200 on 336x336", True),
        (dataclasses.replace(CROPPED, resize=Resize("exact", 336, 336, "bicubic")), (9, 99), "to 336x336", False),
    ],
)  # fmt: skip
def test_one_tile_shows_what_is_cut_off_or_padded(
    image: ImageSettings, size: tuple[int, int], said: str, padding: bool
) -> None:
    settings, side = KINDS["single"]
    shown = draw(tiler(settings, (side, side)).plan(*size), image)
    assert said in shown
    assert (PADDING in shown) == padding
    # As the pixels are: white pictures, so that black is padding.
    made = preprocess(Image.new("RGB", size, "white"), image)
    assert (made.min() < 0.5) == padding


# -- vlm info ---------------------------------------------------------------------------------


@pytest.fixture
def of_kind(tmp_path: Path, bundle: Callable[..., Path]) -> Callable[[str], Path]:
    """of_kind(kind) -> a folder with nothing but the manifest of a bundle with this tiling."""

    def make(kind: str) -> Path:
        settings, side = KINDS[kind]
        manifest = read_manifest(bundle("clip-llama"))
        image = dataclasses.replace(CROPPED, crop=(side, side), height=side, width=side)
        changed = dataclasses.replace(manifest, tiling=settings, image=image)
        (tmp_path / "manifest.json").write_text(changed.dump(), encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("kind", "tokens", "terms", "tiles", "grid"),
    [
        ("single", 576, {"picture": 576}, 1, "1"),
        ("anyres", 2340, {"overview": 576, "tiles": 1728, "newlines": 36}, 5, "2x2"),
        ("overlap", 1920, {"overview": 576, "tiles": 1344}, 5, "2x2"),
        ("split", 832, {"tiles": 768, "overview": 64}, 13, "3x4"),
    ],
)
def test_info_counts_from_the_manifest_alone(
    kind: str, tokens: int, terms: dict[str, int], tiles: int, grid: str,
    of_kind: Callable[[str], Path],
) -> None:  # fmt: skip
    folder = of_kind(kind)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]  # no engine, no newline
    result = vlm("info", folder, "--image-size", "640x480", "--json")
    assert result.exit_code == 0, result.output
    image = json.loads(result.stdout)["image"]
    assert image == {
        "width": 640, "height": 480, "tokens": tokens, "terms": terms, "tiles": tiles, "grid": grid,
        "limited": None,
    }  # fmt: skip
    assert "┼" not in result.stdout
    shown = vlm("info", folder, "--image-size", "640x480").stdout
    if len(terms) > 1:
        summed = " + ".join(f"{count} {name}" for name, count in terms.items())
        assert f"visual tokens: {tokens} = {summed}\n" in shown
        assert f"640x480 pixels: {grid} tiles and an overview ({tiles} tiles in all)\n" in shown
    else:
        assert "640x480 pixels: one tile\nvisual tokens: 576\n" in shown
    assert ("┼" in shown.partition("visual tokens")[2]) == (kind != "single")


@pytest.mark.parametrize(
    ("kind", "limit", "grid", "tokens"),
    [
        ("anyres", ["--max-tiles", "4"], "1x2", None),
        ("anyres", ["--max-tiles", "1"], "1", 577),
        ("anyres", ["--max-visual-tokens", "2000"], None, None),
        ("overlap", ["--max-tiles", "4"], "1", 576),
        ("split", ["--max-visual-tokens", "500"], None, None),
    ],
)
def test_info_keeps_limits_and_says_what_they_changed(
    kind: str, limit: list[str], grid: str | None, tokens: int | None, of_kind: Callable[[str], Path]
) -> None:  # fmt: skip
    folder = of_kind(kind)
    size = ("--image-size", "1000x640")
    free = json.loads(vlm("info", folder, *size, "--json").stdout)["image"]
    image = json.loads(vlm("info", folder, *size, *limit, "--json").stdout)["image"]
    assert image["tiles" if limit[0] == "--max-tiles" else "tokens"] <= int(limit[1])
    assert grid in (None, image["grid"])
    assert tokens in (None, image["tokens"])
    assert image["limited"] == {key: free[key] for key in ("grid", "tiles", "tokens")}
    shown = vlm("info", folder, *size, *limit).stdout
    count = f"{image['tiles']} tiles in all; " if image["tiles"] > 1 else ""
    assert f" ({count}limited: would be {free['grid']}, {free['tokens']} tokens)\n" in shown


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("single", {}, "single: one tile"),
        ("anyres", {}, "anyres: 1x2, 2x1, 2x2, 3x1, 1x3 tiles and an overview"),
        ("overlap", {"overlap": (6, 4)},
         "overlap: 2x2 tiles and an overview; neighbours share 6x4 tokens, merge crop"),
        ("split", {"longest_edge": 1024}, "split: 1x2, 2x2, 2x1 tiles and an overview"),
        ("split", {"longest_edge": 512}, "split: an overview alone"),
        ("split", {"split": False}, "split: an overview alone"),
        ("split", {"longest_edge": None},
         "split: as many tiles as the picture has room for, and an overview"),
    ],
)  # fmt: skip
def test_every_tiling_in_words(kind: str, changes: dict[str, Any], said: str) -> None:
    settings, side = KINDS[kind]
    settings = dataclasses.replace(settings, **changes)
    assert every(settings, tiler(settings, (side, side)).grids()) == said


@pytest.mark.parametrize("kind", KINDS)
def test_info_says_what_a_model_can_make(kind: str, of_kind: Callable[[str], Path]) -> None:
    shown = " ".join(vlm("info", of_kind(kind)).stdout.split())
    settings, side = KINDS[kind]
    assert f"tiling {every(settings, tiler(settings, (side, side)).grids())} context" in shown


def test_limits_without_effect_are_not_mentioned(of_kind: Callable[[str], Path]) -> None:
    result = vlm("info", of_kind("anyres"), "--image-size", "640x480", "--max-tiles", "5")
    assert "limited" not in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--max-tiles", "3"], 2, "need --image-size"),
        (["--image-size", "640x480", "--max-tiles", "0"], 2, "x>=1"),
        (["--image-size", "640x480", "--max-visual-tokens", "575"], 1, "at least 576 of a 640x480 picture"),
    ],
)  # fmt: skip
def test_limits_that_make_no_sense(
    args: list[str], code: int, said: str, of_kind: Callable[[str], Path]
) -> None:
    result = vlm("info", of_kind("overlap"), *args)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""


# -- vlm run, chat, bench -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip-llama with 2x2 tiles: 9 tokens, or 9 + 25 where a picture is square."""
    folder = tmp_path_factory.mktemp("tiled") / "bundle"
    export(checkpoint("clip-llama"), folder, tiling=OverlapOrder((2, 2), 0.34))
    return folder


@pytest.fixture
def street(tmp_path: Path, pictures: dict[str, Path]) -> Path:
    path = tmp_path / "street.png"
    Image.open(pictures["wide.png"]).convert("RGB").resize((80, 80)).save(path)
    return path


SHORT = ("-p", "what is this?", "--max-new-tokens", "3", "--threads", "1")


def test_run_says_what_a_picture_becomes(tiled: Path, street: Path, tmp_path: Path) -> None:
    shutil.copy(street, tmp_path / "other.png")
    result = vlm("run", tiled, street, tmp_path / "other.png", *SHORT)
    assert result.exit_code == 0, result.output
    lines = [
        f"{name}: 2x2 tiles and an overview, 34 tokens" for name in ("street.png", "other.png")
    ]
    assert result.stderr.splitlines() == lines


@pytest.mark.parametrize("limit", [("--max-tiles", "4"), ("--max-visual-tokens", "33")])
def test_run_keeps_limits(limit: tuple[str, str], tiled: Path, street: Path) -> None:
    result = vlm("run", tiled, street, *SHORT, *limit)
    said = "street.png: an overview alone, 9 tokens (limited: would be 2x2, 34 tokens)\n"
    assert result.stderr == said
    document = json.loads(vlm("run", tiled, street, *SHORT, *limit, "--json").stdout)
    assert document["visual_tokens"] == 9
    assert document["images"] == [
        {
            "name": "street.png", "width": 80, "height": 80, "tokens": 9, "terms": {"overview": 9},
            "tiles": 1, "grid": "1", "limited": {"grid": "2x2", "tiles": 5, "tokens": 34},
        }
    ]  # fmt: skip
    assert document["text"] + "\n" == result.stdout


def test_a_limit_that_cannot_be_kept_is_an_error(
    tiled: Path, street: Path, bundle: Callable[..., Path]
) -> None:
    for folder in (tiled, bundle("clip-llama")):
        result = vlm("run", folder, street, *SHORT, "--max-visual-tokens", "8")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr == (
            "error: max_visual_tokens = 8 cannot be kept: this model makes at least 9 of a 80x80 picture\n"
        )


def test_a_model_without_a_choice_is_quiet(bundle: Callable[..., Path], street: Path) -> None:
    result = vlm("run", bundle("clip-llama"), street, *SHORT, "--max-tiles", "1")
    assert result.exit_code == 0
    assert result.stderr == ""
    document: dict[str, Any] = json.loads(
        vlm("run", bundle("clip-llama"), street, *SHORT, "--json").stdout
    )
    assert document["images"][0]["terms"] == {"picture": 9}
    assert document["images"][0]["limited"] is None


def test_chat_says_it_of_new_pictures_only(tiled: Path, street: Path) -> None:
    asked = f"what?\nand now?\n/image {street}\nand this?\n"
    args = ["run", str(tiled), str(street), "--max-new-tokens", "2", "--max-tiles", "5"]
    result = CliRunner().invoke(cli, args, input=asked)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "tokens" in line]
    assert lines == ["street.png: 2x2 tiles and an overview, 34 tokens"] * 2


def test_bench_counts_tiles(tiled: Path, street: Path) -> None:
    args = (
        "bench",
        tiled,
        "--image",
        street,
        "--runs",
        "1",
        "--warmup",
        "0",
        "--new-tokens",
        "2",
        "--threads",
        "1",
    )
    result = vlm(*args, "--json", "-")
    free = json.loads(result.stdout)["settings"]
    assert (free["tiles"], free["visual_tokens"], free["max_tiles"]) == (5, 34, None)
    assert (free["grid"], free["limited"]) == ("2x2", None)
    assert "street.png: 2x2 tiles and an overview, 34 tokens" in result.stderr.splitlines()
    result = vlm(*args, "--json", "-", "--max-tiles", "2")
    limited = json.loads(result.stdout)["settings"]
    assert (limited["tiles"], limited["visual_tokens"], limited["max_tiles"]) == (1, 9, 2)
    assert limited["grid"] == "1"
    assert limited["limited"] == {"grid": "2x2", "tiles": 5, "tokens": 34}
    said = "street.png: an overview alone, 9 tokens (limited: would be 2x2, 34 tokens)"
    assert said in result.stderr.splitlines()
    assert "(34 visual of 5 tiles)" in " ".join(vlm(*args).stdout.split())
