"""GPTQ: rounding a weight column by column, each column's error made good by the columns to come.

Source: Frantar et al. 2022, arXiv 2210.17323; the inverse Hessian through its Cholesky factor, blocks
of columns that share a scale, scales chosen when a block is reached. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DAMPING = 0.01  # of the Hessian's mean diagonal: keeps the inverse stable where inputs are few

Scales = Callable[[np.ndarray], np.ndarray]


def quantize(
    weight: np.ndarray, upper: np.ndarray, block: int, scales: Scales, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` so that its product with the calibration inputs changes least.

    Args:
        weight: float32 [in, out].
        upper: `factor` of the calibration inputs' sum of x x^T, [in, in].
        block: inputs that share a scale; divides `in`.
        scales: `[block, out] -> [out]`, the scale of each output over one block.
        low, high: bounds of the rounded values.

    Returns:
        Rounded values float32 [in, out] and scales float32 [in / block, out].
    """
    inputs, outputs = weight.shape
    remaining = weight.astype(np.float32)  # columns not rounded yet, corrected for those that are
    values = np.empty_like(remaining)
    chosen = np.empty((inputs // block, outputs), np.float32)
    for start in range(0, inputs, block):
        end = start + block
        chosen[start // block] = scale = scales(remaining[start:end])
        errors = np.empty((block, outputs), np.float32)
        for column in range(start, end):
            row = remaining[column]
            values[column] = rounded = np.clip(np.rint(row / scale), low, high)
            errors[column - start] = error = (row - rounded * scale) / upper[column, column]
            remaining[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        remaining[end:] -= upper[start:end, end:].T @ errors
    return values, chosen


def factor(hessian: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the damped inverse, float32 [in, in].

    Args:
        hessian: float32 [in, in], the sum of x x^T over calibration inputs x [in].
    """
    damped = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0  # an input that is always zero: any rounding will do
    diagonal += DAMPING * (mean or 1.0)
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
