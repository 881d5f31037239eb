"""`vlm verify` on LLaVA-NeXT: tiling is a rung of its own, and padding tiles are no difference."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_verify import rehash
from tiny import edit_json

from vlm_edge.export.verification.report import STAGES, Report, Rung
from vlm_edge.export.verify import verify

PROMPT = "what is it?"


def rung(report: Report, name: str) -> Rung:
    (found,) = [rung for rung in report.rungs if rung.name == name and rung.probe == "picture"]
    return found


@pytest.mark.verifies("llava_next", "`vlm verify` ladder")
@pytest.mark.parametrize("case", ["next-clip-vicuna-v4", "next-siglip-qwen2", "next-fine-native"])
def test_a_good_bundle_passes_with_unequal_pictures(
    case: str,
    bundle: Callable[..., Path],
    checkpoint: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    images = [pictures["wide.png"], pictures["rotated.jpg"], pictures["pixel.png"]]
    report = verify(bundle(case), checkpoint(case), images, PROMPT, 4)
    assert report.ok, report.sentence()
    assert {rung.name for rung in report.rungs if rung.probe == "picture"} == set(STAGES)
    assert all(rung.ok for rung in report.rungs)


def test_the_tiling_rung_has_the_terms_of_each_picture(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path], pictures: dict[str, Path]
) -> None:
    case = "next-clip-vicuna-v4"
    images = [pictures["wide.png"], pictures["pixel.png"]]
    found = rung(verify(bundle(case), checkpoint(case), images, PROMPT, 1), "tiling")
    assert found.detail == (
        "61x37: 5 tile(s), 37 = 9 + 24 + 4 tokens; 1x1: 3 tile(s), 24 = 9 + 12 + 3 tokens"
    )


def test_a_bundle_that_lost_a_resolution(
    tmp_path: Path,
    bundle: Callable[..., Path],
    checkpoint: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    """Token ids differ first; the rung above says why."""
    folder = shutil.copytree(bundle("next-clip-vicuna-v4"), tmp_path / "bundle")
    edit_json(folder / "manifest.json", "tiling.resolutions", [[30, 60], [60, 30]])
    report = verify(folder, checkpoint("next-clip-vicuna-v4"), [pictures["wide.png"]], PROMPT, 1)
    assert report.divergence is not None
    assert report.divergence.name == "token ids"
    found = rung(report, "tiling")
    assert (found.ok, found.value) == (False, 1)
    assert found.detail.endswith(" instead of 5 tile(s), 37 tokens")
    assert not [rung for rung in report.rungs if rung.name == "pixels"]


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "overview": ("pixels", lambda folder: edit_json(folder / "manifest.json", "tiling.overview",
                                                    [28, 30])),
    "newline": ("embeddings", lambda folder: np.save(folder / "image_newline.npy",
                                                     np.ones(48, np.float32))),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_by_its_stage(
    stage: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    bundle: Callable[..., Path],
    checkpoint: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    folder = shutil.copytree(bundle("next-clip-vicuna-v4"), tmp_path / "bundle")
    damage(folder)
    rehash(folder)
    report = verify(folder, checkpoint("next-clip-vicuna-v4"), [pictures["wide.png"]], PROMPT, 1)
    assert report.divergence is not None
    assert report.divergence.name == stage
    assert rung(report, "tiling").ok
