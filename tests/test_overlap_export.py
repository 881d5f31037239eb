"""Overlapping tiles from checkpoint to answer: against transformers run tile by tile, and by definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import Reference

from vlm_edge import VLM
from vlm_edge.cli.export import MERGES
from vlm_edge.cli.main import cli
from vlm_edge.errors import SettingError
from vlm_edge.export.pipeline import export, read_model
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.tiling import OverlapOrder, with_overlap
from vlm_edge.runtime.manifest import read_manifest
from vlm_edge.runtime.tiling.overlap import OverlapTiler
from vlm_edge.runtime.tiling.settings import Merge, Overlap

# checkpoint, order: a CLIP tile, a SigLIP tile that is larger than its patches, interpolated positions
CASES = {
    "crop": ("clip-llama", OverlapOrder((2, 2), 0.3, "crop")),
    "average": ("siglip-qwen2", OverlapOrder((2, 3), 0.34, "average")),
    "keep": ("dinov2-llama", OverlapOrder((1, 2), 0.5, "keep")),
    "most": ("dinov2-llama", OverlapOrder((2, 2), 0.75, "crop")),
    "none": ("clip-llama", OverlapOrder((3, 1), 0.0, "crop")),
}
SIZES = ((50, 40), (31, 95), (200, 37), (64, 64))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]
) -> Callable[..., Path]:
    """exported(case of CASES, precision="fp32") -> its bundle."""
    made: dict[tuple[str, str], Path] = {}
    root = tmp_path_factory.mktemp("overlapping")

    def make(case: str, precision: str = "fp32") -> Path:
        if (case, precision) not in made:
            name, order = CASES[case]
            made[case, precision] = root / f"{case}-{precision}"
            plan = PrecisionPlan.uniform(precision)
            export(checkpoint(name), made[case, precision], precision=plan, tiling=order)
        return made[case, precision]

    return make


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = []
    for width, height in SIZES:
        small = rng.integers(0, 256, (7, 9, 3), np.uint8)
        paths.append(folder / f"{width}x{height}.png")
        Image.fromarray(small).resize((width, height)).save(paths[-1])
    return paths


# -- against transformers ---------------------------------------------------------------------


def tiles_by_hand(picture: Image.Image, bundle: Path) -> tuple[list[Image.Image], np.ndarray]:
    """The detail tiles, and bool [rows, columns]: which of the sheet's tokens show some of the picture."""
    manifest = read_manifest(bundle)
    tiling = manifest.tiling
    assert isinstance(tiling, Overlap)
    side = manifest.image.height, manifest.image.width
    patch = [side[i] // tiling.grid[i] for i in (0, 1)]
    step = [(tiling.grid[i] - tiling.overlap[i]) * patch[i] for i in (0, 1)]
    high, wide = (side[i] + (tiling.tiles[i] - 1) * step[i] for i in (0, 1))
    scale = min(wide / picture.width, high / picture.height)
    scaled = (
        min(wide, -int(-picture.width * scale // 1)),
        min(high, -int(-picture.height * scale // 1)),
    )
    canvas = Image.new("RGB", (wide, high))
    place = (wide - scaled[0]) // 2, (high - scaled[1]) // 2
    canvas.paste(picture.resize(scaled, Image.Resampling[tiling.resample.upper()]), place)
    tiles = []
    for top in range(0, high - side[0] + 1, step[0] or high):
        for left in range(0, wide - side[1] + 1, step[1] or wide):
            tiles.append(canvas.crop((left, top, left + side[1], top + side[0])))
    shown = Image.new("L", (wide, high))
    shown.paste(255, (*place, place[0] + scaled[0], place[1] + scaled[1]))
    tokens = [
        tiling.grid[i] + (tiling.tiles[i] - 1) * (tiling.grid[i] - tiling.overlap[i])
        for i in (0, 1)
    ]
    mask = np.asarray(shown)[: tokens[0] * patch[0], : tokens[1] * patch[1]] > 0
    return tiles, mask.reshape(tokens[0], patch[0], tokens[1], patch[1]).any((1, 3))


def merged_by_hand(features: np.ndarray, shown: np.ndarray, tiling: Overlap) -> np.ndarray:
    """Token by token, as docs/tiling.md says it."""
    if tiling.merge == "keep":
        return features.reshape(-1, features.shape[-1])
    (down, across), (rows, columns) = tiling.grid, tiling.tiles
    stride = down - tiling.overlap[0], across - tiling.overlap[1]
    found = []
    for y, x in zip(*np.nonzero(shown), strict=True):
        seen = []  # (how deep inside, index, token) of every tile that has this place
        for index in range(rows * columns):
            i, j = y - index // columns * stride[0], x - index % columns * stride[1]
            if 0 <= i < down and 0 <= j < across:
                depth = min(i, down - 1 - i), min(j, across - 1 - j)
                seen.append((depth, index, features[index, i * across + j]))
        if tiling.merge == "average":
            found.append(np.mean([token for _, _, token in seen], 0))
        else:
            deepest = max(d for (d, _), _, _ in seen), max(d for (_, d), _, _ in seen)
            found.append([token for depth, _, token in seen if depth == deepest][-1])
    return np.array(found, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_transformers_over_the_same_tiles(
    case: str, exported: Callable[..., Path], reference: Callable[[str], Reference], photos: list[Path]
) -> None:  # fmt: skip
    """Pixels, visual tokens, logits and greedy tokens, two pictures of different shapes in a prompt."""
    import torch

    bundle, theirs = exported(case), reference(CASES[case][0])
    tiling = read_manifest(bundle).tiling
    assert isinstance(tiling, Overlap)
    processor, model = theirs.processor.image_processor, theirs.model
    for pair in (photos[:2], photos[2:]):
        with VLM.load(bundle, threads=1) as vlm, torch.inference_mode():
            built = vlm.build_prompt("what is this?", pair)
            visual = []
            for picture, path in zip(built.pictures, pair, strict=True):
                image = Image.open(path)
                overview = processor(image, return_tensors="pt").pixel_values
                tiles, shown = tiles_by_hand(image, bundle)
                detail = processor(
                    tiles, do_resize=False, do_center_crop=False, do_pad=False, return_tensors="pt"
                )
                pixels = torch.cat([overview, detail.pixel_values])
                np.testing.assert_array_equal(vlm.pixels(picture), pixels.numpy())
                features = model.model.get_image_features(pixels).pooler_output
                whole = (
                    torch.stack(list(features))
                    .reshape(len(pixels), -1, features[0].shape[-1])
                    .numpy()
                )
                merged = merged_by_hand(whole[1:], shown, tiling)
                visual.append(np.concatenate([whole[0], merged]))
                assert picture.plan.terms == (("overview", len(whole[0])), ("tiles", len(merged)))
                np.testing.assert_allclose(vlm.encode(picture), visual[-1], atol=2e-4)
            ids = torch.tensor([built.token_ids])
            embeds = model.get_input_embeddings()(ids).clone()
            embeds[ids == vlm.manifest.prompt.image_token_id] = torch.tensor(np.concatenate(visual))
            expected = model.model.language_model(inputs_embeds=embeds).last_hidden_state
            logits = model.lm_head(expected)[0, -1].numpy()
            vlm.decoder.length = 0
            found = vlm.decoder.prefill(vlm.embed(built))
            assert np.abs(found - logits).max() < 2e-4 * np.abs(logits).max()
            answer = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=8,
            )
            result = vlm.generate("what is this?", pair, max_new_tokens=8, repetition_penalty=1.0)
            assert result.token_ids == answer[0].tolist()[: len(result.token_ids)]
            assert [p.tiles for p in result.plans] == [1 + np.prod(tiling.tiles)] * 2


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_merging_is_its_definition(data: st.DataObject) -> None:
    """Over random grids and overlaps, more than half a tile among them."""
    side = st.integers(2, 7)
    grid = data.draw(st.tuples(side, side))
    overlap = data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1))
    tiles = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda t: t != (1, 1)))
    merge: Any = data.draw(st.sampled_from(["crop", "average", "keep"]))
    patch = data.draw(st.integers(1, 3))
    tiling = Overlap("overlap", grid, tiles, overlap, merge, "bicubic")
    # A side may have pixels beyond its patches, as SigLIP's.
    beyond = data.draw(st.integers(0, min(patch, grid[0]) - 1))
    tile = grid[0] * patch + beyond, grid[1] * patch
    tiler = OverlapTiler(tiling, tile)
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    plan = tiler.plan(width, height)
    sheet = plan.sheets[1]
    assert sheet is not None
    begin, size = sheet.offset, sheet.scaled[0]
    shown = np.zeros([grid[i] + (tiles[i] - 1) * (grid[i] - overlap[i]) for i in (0, 1)], bool)
    for y, x in np.ndindex(shown.shape):
        inside = [
            begin[i] < (at + 1) * patch and at * patch < begin[i] + size[i]
            for i, at in enumerate((y, x))
        ]
        shown[y, x] = all(inside)
    count = 1 + tiles[0] * tiles[1]
    features = np.random.default_rng(0).random((count, grid[0] * grid[1], 2), np.float32)
    found = tiler.assemble(plan, features)
    expected = np.concatenate([features[0], merged_by_hand(features[1:], shown, tiling)])
    assert len(found) == plan.tokens
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# -- limits, precisions, verification ------------------------------------------------------------


@pytest.mark.parametrize("case", ["crop", "average"])
def test_one_tile_is_the_model_without_tiling(
    case: str, exported: Callable[..., Path], vlm: Callable[..., VLM], photos: list[Path]
) -> None:
    plain = vlm(CASES[case][0]).generate("what is this?", photos[0], max_new_tokens=8)
    with VLM.load(exported(case), threads=1) as tiled:
        one = tiled.generate("what is this?", photos[0], max_new_tokens=8, max_tiles=1)
        assert one.token_ids == plain.token_ids
        assert one.visual_tokens == plain.visual_tokens < tiled.count_tokens(50, 40)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_parts_are_calibrated_over_the_tiles(
    precision: str, exported: Callable[..., Path], photos: list[Path]
) -> None:
    manifest = read_manifest(exported("crop", precision))
    assert manifest.calibration is not None
    assert manifest.engines["vision"].precision == "int8"
    stored = manifest.calibration["data"]
    assert set(stored["tilings"]) == {"2x2"}
    assert set(stored["tiles"]) == {"5"}
    assert manifest.calibration["warnings"] == []
    with VLM.load(exported("crop"), threads=1) as exact, VLM.load(exported("crop", precision), threads=1) as vlm:  # fmt: skip
        for photo in photos:
            picture = vlm.build_prompt("x", photo).pictures[0]
            found, expected = vlm.encode(picture).ravel(), exact.encode(picture).ravel()
            cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
            assert cosine > 0.99
            assert vlm.count_tokens(*picture.decoded.image.size) == picture.plan.tokens
            assert (
                vlm.generate("what?", photo, max_new_tokens=3).visual_tokens == picture.plan.tokens
            )


def test_verify_compares_the_overview_and_says_so(
    exported: Callable[..., Path], checkpoint: Callable[[str], Path]
) -> None:
    args = [
        "verify",
        str(exported("crop")),
        "--against",
        str(checkpoint("clip-llama")),
        "--json",
        "--no-store",
    ]
    result = CliRunner().invoke(cli, [*args, "--new-tokens", "4"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["ok"] is True
    assert "the greedy tokens are the same" in said["sentence"]
    assert "their overview alone" in said["sentence"]


# -- what is asked for ------------------------------------------------------------------------


def test_the_overlap_is_rounded_to_tokens_and_stored(checkpoint: Callable[[str], Path]) -> None:
    model = read_model(checkpoint("dinov2-llama"))[1]  # 4x4 tokens
    for overlap, tokens in ((0, 0), (0.1, 0), (0.25, 1), (0.4, 2), (0.9, 3)):
        tiling = with_overlap(model, OverlapOrder((2, 2), overlap)).tiling
        assert isinstance(tiling, Overlap)
        assert tiling.overlap == (tokens, tokens)
        assert tiling.grid == (4, 4)


def test_export_prints_what_the_order_became(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    args = ["export", str(checkpoint("clip-llama")), "-o", str(tmp_path / "b"), "--tiling", "2x3"]
    result = CliRunner().invoke(cli, [*args, "--overlap", "0.4", "--merge", "average"])
    assert result.exit_code == 0, result.output
    assert (
        "2x3 tiles whose neighbours share 1 of 3 rows and 1 of 3 columns of tokens" in result.stdout
    )
    stored = read_manifest(tmp_path / "b").tiling
    assert stored == Overlap("overlap", (3, 3), (2, 3), (1, 1), "average", "bicubic")


@pytest.mark.parametrize(
    ("case", "args", "said"),
    [
        ("clip-llama", ["--tiling", "two"], "ROWSxCOLUMNS"),
        ("clip-llama", ["--tiling", "1x1"], "two tiles at least"),
        ("clip-llama", ["--tiling", "0x3"], "two tiles at least"),
        ("clip-llama", ["--tiling", "2x2", "--overlap", "0.91"], "0 to 0.9"),
        ("clip-llama", ["--tiling", "2x2", "--overlap", "-0.1"], "0 to 0.9"),
        ("clip-llama", ["--tiling", "2x2", "--overlap", "nan"], "0 to 0.9"),
        ("clip-llama", ["--tiling", "2x2", "--merge", "first"], "'crop', 'average', 'keep'"),
        ("clip-llama", ["--overlap", "0.2"], "belong to --tiling"),
        ("clip-llama", ["--tiling", "9x9", "--overlap", "0"], "the language model has 640 positions"),
        ("clip-llama-biases", ["--tiling", "2x2"], "form no grid"),  # the class token stays
        ("dinov2-swiglu", ["--tiling", "2x2"], "form no grid"),
    ],
)  # fmt: skip
def test_orders_that_are_refused(
    case: str, args: list[str], said: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:  # fmt: skip
    result = CliRunner().invoke(cli, ["export", str(checkpoint(case)), *args, "-o", str(tmp_path / "b")])  # fmt: skip
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not any(tmp_path.iterdir())


def test_the_command_line_offers_every_merge() -> None:
    assert get_args(Merge) == MERGES


def test_a_model_that_tiles_is_refused(checkpoint: Callable[[str], Path]) -> None:
    tiled = read_model(checkpoint("next-clip-mistral"))[1]
    with pytest.raises(SettingError, match=r"llava_next has a tiling of its own \(anyres\)"):
        with_overlap(tiled, OverlapOrder((2, 2)))
