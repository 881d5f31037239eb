"""Position embeddings resized at export against torch's bicubic interpolation at run time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_edge.export.layers.interpolate import resize_positions


def tolerance(side: int) -> float:
    """float32 places a sample on a grid of `side` to side * 2^-24, and values change by 4 a step or so."""
    return 8e-6 + 1e-6 * side


def theirs(table: np.ndarray, height: int, width: int) -> np.ndarray:
    import torch

    side = round(len(table) ** 0.5)
    grid = torch.from_numpy(table).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        grid, size=(height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1).reshape(height * width, -1).numpy()


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 40),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_equals_torch(side: int, height: int, width: int, seed: int) -> None:
    table = np.random.default_rng(seed).standard_normal((side * side, 3)).astype(np.float32)
    found = resize_positions(table, height, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, theirs(table, height, width), rtol=0, atol=tolerance(side))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (37, 24), (1, 5)])
def test_the_grid_of_dinov2(height: int, width: int) -> None:
    side = 37
    table = np.random.default_rng(0).standard_normal((side * side, 8)).astype(np.float32)
    found = resize_positions(table, height, width)
    assert found.shape == (height * width, 8)
    np.testing.assert_allclose(found, theirs(table, height, width), rtol=0, atol=tolerance(side))


def test_its_own_grid_is_left_as_it_is() -> None:
    table = np.random.default_rng(1).standard_normal((49, 4)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, 7, 7), table)
