"""The preprocessing benchmark times equal work, and says so when it is not."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from vlm_edge.benchmarks import preprocessing
from vlm_edge.errors import VlmEdgeError

NEXT = "LlavaNextImageProcessorPil", {
    "size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30},
    "image_grid_pinpoints": [[30, 60], [60, 30]],
}  # fmt: skip
SPLIT = "Idefics3ImageProcessorPil", {
    "size": {"longest_edge": 60}, "max_image_size": {"longest_edge": 30},
}  # fmt: skip


@pytest.mark.parametrize(("subject", "tiles"), [(NEXT, 3), (SPLIT, 5)])
def test_both_are_timed_on_equal_pixels(subject: tuple[str, dict], tiles: int) -> None:
    found = preprocessing.compare(*subject, 50, 41, 3)
    assert found.tiles == tiles
    assert len(found.ours) == len(found.theirs) == 3
    assert min(found.ours + found.theirs) > 0
    pairs = sorted(b / a for a, b in zip(found.ours, found.theirs, strict=True))
    assert found.ratio == pairs[1]


def test_other_pixels_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "preprocess", lambda *_: np.zeros((3, 3, 30, 30)))
    with pytest.raises(
        VlmEdgeError, match="LlavaNextImageProcessorPil makes other pixels of a 50x41"
    ):
        preprocessing.compare(*NEXT, 50, 41, 1)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "SUBJECTS", (("tiny", NEXT, (50, 41)),))
    result = CliRunner().invoke(preprocessing.main, ["--runs", "1"])
    assert result.exit_code == 0, result.output
    assert "tiny" in result.output
    assert "50x41" in result.output
