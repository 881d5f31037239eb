"""A weight's scales and its values rounded to them, block by block (symmetric, zero-point 0)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from vlm_edge.errors import CheckpointError
from vlm_edge.export.checkpoint import TensorRef

TINY = np.float32(1e-12)  # smallest scale: a column of zeros stays zero instead of dividing by it


def block_size(inputs: int, longest: int) -> int:
    """The longest power of two <= `longest` that divides the width; the whole width where none >= 16
    does (one scale a column)."""
    size = longest
    while size >= 16:
        if inputs % size == 0:
            return size
        size //= 2
    return inputs


def refuse_not_finite(weight: TensorRef, size: float) -> None:
    """Raises CheckpointError if `size`, a sum over the weight's magnitudes, is not a number."""
    if not math.isfinite(size):
        raise CheckpointError(f"tensor {weight.name} holds values that are not finite numbers")


def channel_scales(weight: TensorRef, factors: np.ndarray) -> np.ndarray:
    """float32 [out]: the scale that maps each output channel's largest weight to 127, once inputs'
    weights are multiplied by `factors` [in]."""
    peaks = np.concatenate([np.abs(rows * factors).max(axis=1) for rows in weight.rows()])
    refuse_not_finite(weight, float(peaks.sum()))
    return np.maximum(peaks / np.float32(127), TINY).astype(np.float32)


def scaled(
    weight: TensorRef, factors: np.ndarray | None, step: int | None = None
) -> Iterator[np.ndarray]:
    """float32 blocks [step, out] of the weight [out, in], inputs' weights multiplied by `factors`."""
    start = 0
    for rows in weight.T.rows(step):
        if factors is not None:
            rows *= factors[start : start + len(rows), None]
        start += len(rows)
        yield rows


def int8_columns(weight: TensorRef, scale: np.ndarray, factors: np.ndarray) -> Iterator[np.ndarray]:
    for rows in scaled(weight, factors):
        np.divide(rows, scale, out=rows)
        yield np.clip(np.rint(rows, out=rows), -127, 127).astype(np.int8)


def rounded(grouped: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """float32 whole numbers in the range of `bits` bits."""
    values = np.divide(grouped, scales)
    np.rint(values, out=values)
    return np.clip(values, *((-127, 127) if bits == 8 else (-8, 7)), out=values)


def best_scales(grouped: np.ndarray, bits: int) -> np.ndarray:
    """Scale of each block of `grouped` [blocks, block, out] as [blocks, 1, out].

    At 4 bits it is the one of least squared error among a few, since clipping the largest weight a
    little pays when there are only 16 levels.
    """
    peak = np.abs(grouped).max(axis=1, keepdims=True)
    if bits == 8:
        return np.maximum(peak / np.float32(127), TINY)
    best = np.maximum(peak / np.float32(7), TINY)
    least = np.full(peak.shape, np.inf, np.float32)
    for shrink in np.linspace(1.0, 0.76, 5, dtype=np.float32):
        scale = np.maximum(peak * shrink / np.float32(7), TINY)
        off = rounded(grouped, scale, bits)
        off *= scale
        off -= grouped
        error = np.square(off, out=off).sum(axis=1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best
