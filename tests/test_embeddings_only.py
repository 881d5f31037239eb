"""A feature layer that is the embeddings alone: a vision engine without a linear layer, in INT8 too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import edit_json

from vlm_edge import VLM
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_embeddings_as_features(
    precision: str, tmp_path: Path, checkpoint: Callable[[str], Path], pictures: dict[str, Path]
) -> None:
    import shutil

    folder = shutil.copytree(checkpoint("siglip-qwen2"), tmp_path / "checkpoint")
    edit_json(folder / "config.json", "vision_feature_layer", [0])
    export(folder, tmp_path / "b", precision=PrecisionPlan.uniform(precision))
    with VLM.load(tmp_path / "b") as vlm:
        (wide,) = vlm.build_prompt("<image>", [pictures["wide.png"]], False).pictures
        features = vlm.vision.run({"pixel_values": vlm.pixels(wide)})["features"]
        assert np.isfinite(features).all()
        assert vlm.generate("<image>", [pictures["wide.png"]], False, max_new_tokens=2).token_ids
