"""Bicubic interpolation of learned position embeddings, at export, as torch does it at run time."""

from __future__ import annotations

import numpy as np

CUBIC = -0.75  # torch's coefficient (torch.nn.functional.interpolate, mode="bicubic")


def resize_positions(table: np.ndarray, height: int, width: int) -> np.ndarray:
    """Position embeddings of a square grid resized to another grid.

    Args:
        table: float32 [rows * rows, width of the embedding].
        height, width: of the new grid, in patches.

    Returns:
        float32 [height * width, embedding]; half-pixel centres, edges repeated, no antialiasing
        (align_corners=False, antialias=False).
    """
    side = round(len(table) ** 0.5)
    grid = table.reshape(side, side, -1)
    down = np.einsum("os,sne->one", _weights(side, height), grid)
    return np.einsum("os,nse->noe", _weights(side, width), down).reshape(height * width, -1)


def _weights(size: int, target: int) -> np.ndarray:
    """float32 [target, size]: each output as a weighted sum of inputs."""
    centres = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * np.float32(
        size / target
    ) - np.float32(0.5)
    base = np.floor(centres)
    t = centres - base
    matrix = np.zeros((target, size), np.float32)
    for offset in (-1, 0, 1, 2):
        column = np.clip(base + offset, 0, size - 1).astype(np.int64)
        np.add.at(matrix, (np.arange(target), column), _cubic(np.abs(t - offset)))
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return np.where(x <= 1, near, np.where(x < 2, far, 0)).astype(np.float32)
