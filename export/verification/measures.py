"""Distances between what a bundle computes and what the reference computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TINY = 1e-30


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The worst row's |found - expected| / |expected|, Euclidean over the last axis.

    By row, because one wrong position would drown among hundreds, and because a few positions of a
    language model carry activations a thousand times larger than the rest. NaN counts as infinite.
    """
    if found.shape != expected.shape:
        return float("inf")
    found = found.reshape(-1, found.shape[-1]).astype(np.float64)
    expected = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    errors = np.linalg.norm(found - expected, axis=1) / (np.linalg.norm(expected, axis=1) + TINY)
    return _worst(errors)


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected|; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return _worst(np.abs(found.astype(np.float64) - expected))


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean over rows of the cosine of the angle between them; 1 is the same direction."""
    found = found.reshape(-1, found.shape[-1]).astype(np.float64)
    expected = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.mean((found * expected).sum(axis=1) / (lengths + TINY)))


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int | None:
    """Index of the first differing element, the shorter one's length where one is a prefix."""
    for index, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a != b:
            return index
    return None if len(found) == len(expected) else min(len(found), len(expected))


def _worst(errors: np.ndarray) -> float:
    worst = float(errors.max(initial=0.0))
    return worst if worst == worst else float("inf")
