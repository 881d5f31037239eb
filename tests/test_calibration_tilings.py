"""Calibration over tilings: what is built in for models that tile, and what is kept of many tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlm_edge.calibration.audit import audit
from vlm_edge.calibration.data import FEWEST, CalibrationSet, Prompt, load
from vlm_edge.export.pipeline import MOST_TILES
from vlm_edge.runtime.tiling import AnyRes, Overlap, SingleTile, Split, Tiler, tiler
from vlm_edge.training import large_pictures

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # of LLaVA 1.6
SINGLE = tiler(SingleTile("single", 576), (336, 336))
TILERS = {
    "LLaVA-NeXT": tiler(AnyRes("anyres", (24, 24), PINPOINTS, (336, 336), "bicubic", "n.npy"), (336, 336)),
    "SmolVLM": tiler(Split("split", 64, 2048, True, "lanczos", "<f>", "<g>"), (512, 512)),
    "Idefics3": tiler(Split("split", 169, 1456, True, "lanczos", "<f>", "<g>"), (364, 364)),
    "overlap 2x2": tiler(Overlap("overlap", (24, 24), (2, 2), (6, 6), "crop", "bicubic"), (336, 336)),
    "overlap 3x3": tiler(Overlap("overlap", (24, 24), (3, 3), (6, 6), "keep", "bicubic"), (336, 336)),
}  # fmt: skip


@pytest.mark.parametrize("name", TILERS)
def test_the_built_in_set_exercises_every_tiling(name: str) -> None:
    made = TILERS[name]
    data = load(None, large=True).within(made, MOST_TILES)
    facts, warnings = audit(data, made)
    assert warnings == []
    assert set(facts["tilings"]) == set(made.grids())
    assert sum(made.plan(*size).tiles for size in data.sizes) <= MOST_TILES
    assert len(data.held_out) == len(data.paths) // 4 >= 3
    if len(made.grids()) > 1:  # what is thinned evenly may part the pictures of such a prompt
        assert any(len(prompt.pictures) > 1 for prompt in data.prompts)
    for prompt in data.prompts:
        assert all(index < len(data.paths) for index in prompt.pictures)


def test_a_model_of_one_tile_has_the_data_it_always_had() -> None:
    plain = load(None)
    assert plain.within(SINGLE, MOST_TILES) is plain
    assert len(plain.paths) == 28
    assert plain.sha256 != load(None, large=True).sha256


def numbered(sizes: list[tuple[int, int]]) -> CalibrationSet:
    prompts = tuple(Prompt((index,), f"{index}?") for index in range(len(sizes)))
    return CalibrationSet(tuple(Path(f"{i}.png") for i in range(len(sizes))), tuple(sizes), prompts, "ab" * 32)  # fmt: skip


def test_the_only_picture_of_a_tiling_sets_something() -> None:
    """At position 3 it would be held out."""
    made: Tiler = TILERS["LLaVA-NeXT"]
    data = numbered([(100, 100)] * 3 + [(300, 2000)] + [(100, 100)] * 4)
    assert 3 in data.held_out
    kept = data.within(made, MOST_TILES)
    place = [path.name for path in kept.paths].index("3.png")
    assert place not in kept.held_out
    assert kept.prompts[3] == Prompt((place,), "3?")  # a prompt follows its picture
    assert sorted(path.name for path in kept.paths) == [f"{i}.png" for i in range(8)]


def test_many_tiles_are_thinned_and_rare_tilings_kept() -> None:
    made = TILERS["SmolVLM"]
    data = numbered([(1000, 1000)] * 30 + [(4000, 900)])  # 17 tiles each, and 5
    kept = data.within(made, 60)
    assert "30.png" in [path.name for path in kept.paths]
    assert sum(made.plan(*size).tiles for size in kept.sizes) <= max(60, 17 * FEWEST)
    assert len(kept.paths) == FEWEST
    assert [prompt.text for prompt in kept.prompts] == sorted(
        f"{path.stem}?" for path in kept.paths
    )


def test_the_large_pictures_are_what_their_script_draws(tmp_path: Path) -> None:
    large_pictures.write(tmp_path)
    built_in = {path.name: path for path in load(None, large=True).paths[28:]}
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == sorted(built_in)
    for path in drawn:
        with Image.open(path) as found, Image.open(built_in[path.name]) as committed:
            assert found.size == committed.size
            assert max(found.size) > 2000
    assert (tmp_path / "prompts.jsonl").read_text() == (
        built_in[drawn[0].name].with_name("prompts.jsonl").read_text()
    )
