"""The audit: what calibration exercised, and a warning for each path it never did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from pictures import scene

from vlm_edge.calibration.audit import LONG, aspect_ratios, audit, audit_prompts
from vlm_edge.calibration.data import CalibrationSet, Prompt, load
from vlm_edge.cli.main import cli
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.runtime.manifest import read_manifest
from vlm_edge.runtime.tiling import AnyRes, Overlap, SingleTile, Split, Tiler, Tiling, tiler

PORTRAIT, SQUARE, LANDSCAPE, STRIP = (30, 40), (40, 40), (40, 30), (90, 40)
SINGLE = tiler(SingleTile("single", 4), (20, 20))


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [0] * len(text.split())


def data(sizes: list[tuple[int, int]], prompts: list[Prompt] | None = None) -> CalibrationSet:
    paths = tuple(Path(f"{i}.png") for i in range(len(sizes)))
    return CalibrationSet(paths, tuple(sizes), tuple(prompts or []), "ab" * 32)


def test_aspect_ratios() -> None:
    found = aspect_ratios([PORTRAIT, SQUARE, LANDSCAPE, STRIP, (40, 81), (40, 80)])
    assert found == {
        "portrait": 3, "square": 1, "landscape": 2, "extreme": 2,
        "narrowest": round(40 / 81, 3), "widest": 2.25,
    }  # fmt: skip


def test_only_what_sets_ranges_counts() -> None:
    """The fourth picture is held out: it exercises nothing."""
    facts, warnings = audit(data([PORTRAIT, SQUARE, PORTRAIT, LANDSCAPE]), SINGLE)
    assert facts["pictures"] == 4
    assert facts["held_out"] == 1
    assert facts["aspect_ratios"]["landscape"] == 0
    assert facts["tiles"] == {"1": 3}
    assert warnings == ["calibration had no landscape picture"]


@pytest.mark.parametrize(
    ("sizes", "lacking"),
    [
        ([PORTRAIT, LANDSCAPE], []),
        ([LANDSCAPE, SQUARE], ["no portrait picture"]),
        ([SQUARE, SQUARE], ["no portrait picture", "no landscape picture"]),
    ],
)
def test_shapes_never_seen(sizes: list[tuple[int, int]], lacking: list[str]) -> None:
    _, warnings = audit(data(sizes), SINGLE)
    assert warnings == [f"calibration had {what}" for what in lacking]


ANYRES = AnyRes("anyres", (2, 2), ((20, 40), (40, 20), (40, 40)), (20, 20), "bicubic", "n.npy")
SPLIT = Split("split", 4, 40, True, "lanczos", "<fake>", "<global>")


@pytest.mark.parametrize(
    ("settings", "sizes", "tiles", "tilings", "lacking"),
    [
        # 30 x 40 and 40 x 30 keep most of their pixels in 40 x 40
        (ANYRES, [PORTRAIT, LANDSCAPE], {"5": 2}, {"2x2": 2},
         ["no picture beyond 1:2 or 2:1", "no picture of the tilings 1x2, 2x1"]),
        (ANYRES, [PORTRAIT, (90, 20), (20, 90)], {"3": 2, "5": 1}, {"1x2": 1, "2x1": 1, "2x2": 1}, []),
        (ANYRES, [(10, 30), (30, 10)], {"3": 2}, {"1x2": 1, "2x1": 1},
         ["no picture of the tilings 2x2"]),
        (SPLIT, [PORTRAIT, LANDSCAPE], {"5": 2}, {"2x2": 2},
         ["no picture beyond 1:2 or 2:1", "no picture of the tilings 1x2, 2x1"]),
        (SPLIT, [PORTRAIT, (90, 40), (40, 90)], {"3": 2, "5": 1}, {"1x2": 1, "2x1": 1, "2x2": 1}, []),
        (replace(SPLIT, split=False), [PORTRAIT, LANDSCAPE], {"1": 2}, {"1": 2}, []),
        (Overlap("overlap", (2, 2), (3, 3), (1, 1), "crop", "bicubic"), [PORTRAIT, LANDSCAPE],
         {"10": 2}, {"3x3": 2}, []),
    ],
)  # fmt: skip
def test_tilings_never_seen(
    settings: Tiling, sizes: list[tuple[int, int]], tiles: dict[str, int], tilings: dict[str, int],
    lacking: list[str],
) -> None:  # fmt: skip
    facts, warnings = audit(data(sizes), tiler(settings, (20, 20)))
    assert facts["tiles"] == tiles
    assert facts["tilings"] == tilings
    assert [w.removesuffix(" (rows x columns)") for w in warnings] == [
        f"calibration had {what}" for what in lacking
    ]


def test_tilings_without_bound_are_said_to_be_so() -> None:
    """No scaling: as many tilings as there are sizes, so none can be named and not all be seen."""
    settings, sizes = replace(SPLIT, longest_edge=None), [(60, 30), (20, 45), (20, 20)]
    facts, warnings = audit(data(sizes), tiler(settings, (20, 20)))
    assert facts["tilings"] == {"1": 1, "2x3": 1, "3x2": 1}
    assert warnings == [
        "calibration cannot exercise every tiling: this model scales pictures to no fixed size "
        "(longest_edge is null), so larger ones have ever more tiles"
    ]
    whole = audit(data(sizes), tiler(replace(settings, split=False), (20, 20)))
    assert whole[1] == []  # one tile, whatever the size


@pytest.mark.parametrize("settings", [ANYRES, SPLIT, replace(SPLIT, split=False)])
def test_no_picture_has_a_tiling_the_audit_does_not_know(settings: Tiling) -> None:
    of_model: Tiler = tiler(settings, (20, 20))
    sizes = [(width, height) for width in range(7, 130, 4) for height in range(7, 130, 4)]
    assert {of_model.plan(*size).name for size in sizes} == set(of_model.grids())


LONG_TEXT = Prompt((), "word " * LONG)
ONE, TWO, TEXT = Prompt((0,), "What is it?"), Prompt((0, 1), "Which one?"), Prompt((), "A text.")


@pytest.mark.parametrize(
    ("prompts", "lacking"),
    [
        ([ONE, TWO, LONG_TEXT], []),
        ([TWO, LONG_TEXT], []),
        ([ONE, TWO, TEXT], ["no text of 128 tokens or more; the longest has 3"]),
        ([ONE, LONG_TEXT], ["no prompt with several pictures"]),
        ([TEXT, LONG_TEXT], ["no prompt with a picture"]),
        ([ONE, TWO], ["no text without a picture", "no text of 128 tokens"]),
    ],
)
def test_prompts_never_seen(prompts: list[Prompt], lacking: list[str]) -> None:
    facts, warnings = audit_prompts(prompts, Words())  # type: ignore[arg-type]
    assert len(warnings) == len(lacking)
    for warning, what in zip(warnings, lacking, strict=True):
        assert warning.startswith(f"calibration had {what}")
    assert facts["prompt_pictures"] == {
        "none": sum(not p.pictures for p in prompts),
        "one": prompts.count(ONE),
        "several": prompts.count(TWO),
    }


def test_text_lengths() -> None:
    prompts = [Prompt((), "a b c"), Prompt((), "a"), Prompt((), "a b c d e f")]
    facts, _ = audit_prompts(prompts, Words())  # type: ignore[arg-type]
    assert facts["text_tokens"] == {"min": 1, "median": 3, "max": 6}


def test_the_built_in_pictures_have_every_shape() -> None:
    facts, warnings = audit(load(None), SINGLE)
    assert warnings == []
    assert min(facts["aspect_ratios"][s] for s in ("portrait", "square", "landscape")) >= 2


def test_warnings_are_stored_and_said(
    checkpoint: Callable[[str], Path], tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        scene(40, 35, index).save(folder / f"{index}.png")
    said = "warning: calibration had no portrait picture"
    output = tmp_path / "b"
    result = CliRunner().invoke(
        cli,
        ["export", str(checkpoint("clip-llama")), "--int4", "--calibration", str(folder), "-o", str(output)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert said in result.stderr.splitlines()
    stored = read_manifest(output).calibration
    assert stored is not None
    printed = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [f"warning: {warning}" for warning in stored["warnings"]] == printed
    assert stored["data"]["aspect_ratios"]["landscape"] == 4
    assert stored["data"]["prompt_pictures"] == {"none": 0, "one": 4, "several": 0}
    assert stored["data"]["text_tokens"]["max"] > 0
    assert any("no text without a picture" in line for line in printed)
    shown = CliRunner().invoke(cli, ["info", str(output)])
    assert said in shown.stdout
    facts = json.loads(CliRunner().invoke(cli, ["info", str(output), "--json"]).stdout)
    assert facts["warnings"] == stored["warnings"]
    plain = CliRunner().invoke(cli, ["info", str(bundle("clip-llama"))])
    assert "warning" not in plain.output


def test_prompts_count_where_a_language_model_reads_them(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """INT8 reads fewer of them than INT4, a connector none; the held-out ones count nowhere."""
    counts = {}
    for plan in ("connector=int8", "llm=int8", "llm=int4"):
        report = export(
            checkpoint("clip-llama"), tmp_path / plan, precision=PrecisionPlan.parse(plan)
        )
        stored = read_manifest(tmp_path / plan).calibration
        assert stored is not None
        assert report.warnings == stored["warnings"] == []  # the built-in set leaves nothing out
        counts[plan] = sum(stored["data"].get("prompt_pictures", {}).values())
    built_in = load(None)
    assert counts["connector=int8"] == 0
    assert 0 < counts["llm=int8"] < counts["llm=int4"]
    assert counts["llm=int4"] == len(built_in.prompts) - len(built_in.held_out_prompts)
