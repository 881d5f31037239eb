"""Activation functions by their names in config.json against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graph import run, write

from vlm_edge.export.config import Config
from vlm_edge.export.layers.activations import ACTIVATIONS, activation


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    import torch
    from transformers.activations import ACT2FN

    function = activation(Config({"hidden_act": name}), "hidden_act", "relu")
    path = write(
        tmp_path / "g.onnx",
        lambda op, x: [function(op, x["x"])],
        {"x": ("float32", ("n",))},
        {"y": ("float32", ("n",))},
    )
    values = np.concatenate([np.linspace(-12, 12, 4001), [-100, 100]]).astype(np.float32)
    (found,) = run(path, {"x": values})
    expected = ACT2FN[name](torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
