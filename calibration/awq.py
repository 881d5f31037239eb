"""Scales that make a weight's important inputs larger before it is rounded (activation-aware weights).

Source: AWQ, Lin et al. 2023, arXiv 2306.00978: an input's weights are multiplied by a power of the
input's size, the input is divided by it, and the power is searched for. Here the size is the root mean
square, and a power is judged by what GPTQ will pay for the rounding errors it leaves (`gptq.costs_of`),
which needs no run of the layer. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_edge.calibration import gptq

POWERS = (0.1, 0.2, 0.3, 0.45, 0.6)
LEAST = 1e-2  # of the mean size: inputs that are hardly there are not shrunk further


def scales(
    hessian: np.ndarray,
    upper: np.ndarray,
    weights: Sequence[np.ndarray],
    block: int,
    low: int,
    high: int,
) -> np.ndarray | None:
    """float32 [in]: what the weights are multiplied and the inputs divided by; None where nothing is
    better than nothing.

    Args:
        hessian, upper: the sum of x x^T over calibration inputs, and its `gptq.factor`, [in, in].
        weights: float32 [in, out], of all layers that read the input.
        block: inputs that share a scale.
        low, high: bounds of the rounded values.
    """
    costs = gptq.costs_of(upper)
    sizes = np.sqrt(np.diag(hessian))
    sizes = np.maximum(sizes / (sizes.mean() or 1.0), LEAST)
    best, least = None, sum(_loss(w, costs, block, low, high) for w in weights)
    for power in POWERS:
        factors = (sizes**power).astype(np.float32)
        factors /= np.sqrt(factors.max() * factors.min())
        loss = sum(
            _loss(w * factors[:, None], costs / np.square(factors), block, low, high)
            for w in weights
        )
        if loss < least:
            best, least = factors, loss
    return best


def _loss(weight: np.ndarray, costs: np.ndarray, block: int, low: int, high: int) -> float:
    """What rounding to nearest costs."""
    total = 0.0
    for start in range(0, len(weight), block):
        rows, paid = weight[start : start + block], costs[start : start + block]
        scale = gptq.weighted_scales(rows, paid, low, high)
        off = np.clip(np.rint(rows / scale), low, high) * scale - rows
        total += float(paid @ np.square(off).sum(axis=1))
    return total
