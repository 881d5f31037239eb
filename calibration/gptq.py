"""GPTQ: rounding a weight column by column, each column's error made good by the columns to come.

Source: Frantar et al. 2022, arXiv 2210.17323; the inverse Hessian through its Cholesky factor, blocks
of columns that share a scale, scales chosen when a block is reached. Three things are added:

- a scale is chosen by errors weighted with what GPTQ will pay for them, 1 / upper[c, c]**2;
- afterwards scales are the least-squares ones for the rounded values (`refine`);
- and values are visited once more, one input at a time, each set to its best given all others
  (coordinate descent: Behdin et al. 2023, arXiv 2309.01885).

numpy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DAMPING = 0.01  # of the Hessian's mean diagonal: keeps the inverse stable where inputs are few
SHRINKS = np.linspace(1.0, 0.6, 11, dtype=np.float32)  # of the scale that clips nothing
SYSTEM_BYTES = 64 << 20  # of equations for scales made at once
TINY = np.float32(1e-12)  # smallest scale: a column of zeros stays zero instead of dividing by it

Scales = Callable[[np.ndarray, np.ndarray], np.ndarray]


def weighted_scales(block: np.ndarray, costs: np.ndarray, low: int, high: int) -> np.ndarray:
    """float32 [out]: of a few scales that clip more and more, the one of least weighted squared error.

    Args:
        block: float32 [block, out].
        costs: float32 [block], what a squared error of each input costs.
        low, high: bounds of the rounded values.
    """
    peak = np.maximum(np.abs(block).max(axis=0) / np.float32(high), TINY)
    best, least = peak, np.full(peak.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        scale = peak * shrink
        off = np.divide(block, scale)
        np.clip(np.rint(off, out=off), low, high, out=off)
        off *= scale
        off -= block
        error = costs @ np.square(off, out=off)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return np.maximum(best, TINY)


def quantize(
    weight: np.ndarray, upper: np.ndarray, block: int, scales: Scales, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` so that its product with the calibration inputs changes least.

    Args:
        weight: float32 [in, out].
        upper: `factor` of the calibration inputs' sum of x x^T, [in, in].
        block: inputs that share a scale; divides `in`.
        scales: `([block, out], costs [block]) -> [out]`, the scale of each output over one block.
        low, high: bounds of the rounded values.

    Returns:
        Rounded values float32 [in, out] and scales float32 [in / block, out].
    """
    inputs, outputs = weight.shape
    remaining = weight.astype(np.float32)  # columns not rounded yet, corrected for those that are
    values = np.empty_like(remaining)
    chosen = np.empty((inputs // block, outputs), np.float32)
    costs = costs_of(upper)
    for start in range(0, inputs, block):
        end = start + block
        chosen[start // block] = scale = scales(remaining[start:end], costs[start:end])
        errors = np.empty((block, outputs), np.float32)
        for column in range(start, end):
            row = remaining[column]
            values[column] = rounded = np.clip(np.rint(row / scale), low, high)
            errors[column - start] = error = (row - rounded * scale) / upper[column, column]
            remaining[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        remaining[end:] -= upper[start:end, end:].T @ errors
    return values, chosen


def refine(
    weight: np.ndarray,
    hessian: np.ndarray,
    values: np.ndarray,
    scales: np.ndarray,
    low: int,
    high: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Better values and scales than `quantize` found: least squares, coordinate descent, least squares.

    Args:
        weight: float32 [in, out].
        hessian: float32 [in, in], as `factor` takes it.
        values, scales: what `quantize` gave for them.

    Returns:
        Values and scales of the same shapes. The error of the product is never larger but for the
        damping.
    """
    damped = _damped(hessian).astype(np.float32)
    product = damped @ weight
    scales = _least_squares(damped, product, values, scales)
    values = _descend(damped, product, values, scales, low, high)
    return values, _least_squares(damped, product, values, scales)


def _least_squares(
    hessian: np.ndarray, product: np.ndarray, values: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """float32 [in / block, out]: the scales with which `values` come nearest to the weight.

    With Q an output's values, one column a block, they solve (Q^T H Q) s = Q^T H w.
    """
    outputs, blocks = values.shape[1], len(scales)
    best = np.empty_like(scales)
    step = max(1, SYSTEM_BYTES // (8 * blocks**2))
    for start in range(0, outputs, step):
        part = np.s_[:, start : start + step]
        best[part] = _solved(hessian, product[part], values[part], scales[part])
    return best


def _solved(
    hessian: np.ndarray, product: np.ndarray, values: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """`_least_squares` of a few outputs."""
    (inputs, outputs), blocks = values.shape, len(scales)
    block = inputs // blocks
    grouped = values.reshape(blocks, block, outputs)

    def per_block(array: np.ndarray) -> np.ndarray:
        return np.einsum("bio,bio->ob", grouped, array.reshape(grouped.shape))

    left = np.empty((outputs, blocks, blocks), np.float64)
    for index in range(blocks):
        rows = slice(index * block, (index + 1) * block)
        left[:, :, index] = per_block(hessian[:, rows] @ values[rows])
    unused = left.diagonal(axis1=1, axis2=2) <= 0  # a block of zeros: any scale will do
    left[:, range(blocks), range(blocks)] += unused
    found = np.linalg.solve(left, per_block(product)[..., None].astype(np.float64))[..., 0]
    # A scale is positive (TensorRT) and finite; the few others keep theirs.
    usable = (found > 0) & np.isfinite(found) & ~unused
    return np.where(usable.T, found.T, scales).astype(np.float32)


def _descend(
    hessian: np.ndarray,
    product: np.ndarray,
    values: np.ndarray,
    scales: np.ndarray,
    low: int,
    high: int,
) -> np.ndarray:
    """`values` after one round in which each input's are set to their best, the others given."""
    inputs, blocks = len(values), len(scales)
    block = inputs // blocks
    values, steps = values.copy(), np.repeat(scales, block, axis=0)
    slope = hessian @ (values * steps) - product  # half the error's derivative by each weight
    for start in range(0, inputs, block):
        end = start + block
        before = values[start:end].copy()
        for row in range(start, end):
            better = values[row] - slope[row] / (hessian[row, row] * steps[row])
            better = np.clip(np.rint(better), low, high)
            change = (better - values[row]) * steps[row]
            values[row] = better
            slope[start:end] += hessian[start:end, row, None] * change
        slope[end:] += hessian[end:, start:end] @ ((values[start:end] - before) * steps[start:end])
    return values


def factor(hessian: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the damped inverse, float32 [in, in].

    Args:
        hessian: float32 [in, in], the sum of x x^T over calibration inputs x [in].
    """
    # With rows and columns reversed, H = L L^T and so H^-1 = (L^-1)^T L^-1, which turned back is U^T U:
    # one Cholesky and a triangle's inverse instead of the inverse of all.
    lower = np.linalg.cholesky(_damped(hessian)[::-1, ::-1])
    return np.ascontiguousarray(_inverse(lower)[::-1, ::-1], dtype=np.float32)


def _inverse(lower: np.ndarray) -> np.ndarray:
    """Of a lower triangle, by halves."""
    if len(lower) <= 256:
        return np.tril(np.linalg.inv(lower))
    half = len(lower) // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = first = _inverse(lower[:half, :half])
    inverse[half:, half:] = last = _inverse(lower[half:, half:])
    inverse[half:, :half] = -last @ (lower[half:, :half] @ first)
    return inverse


def costs_of(upper: np.ndarray) -> np.ndarray:
    """float32 [in]: what a squared rounding error of each input costs, once the later ones have made
    good what they can."""
    return 1 / np.square(np.diag(upper))


def _damped(hessian: np.ndarray) -> np.ndarray:
    damped = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0  # an input that is always zero: any rounding will do
    diagonal += DAMPING * (mean or 1.0)
    return damped
