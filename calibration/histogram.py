"""A histogram of magnitudes that grows with what it sees, and the ranges chosen from it.

Bins have one width, a power of two, so that widening them is adding up neighbours: a histogram filled
piece by piece equals one filled at once, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

BINS = 8192  # between a half and all of them lie below the largest magnitude
LOWEST = -126  # exponent of the narrowest scale, float32's smallest normal number
LEVELS = 127  # whole numbers that a magnitude may become in symmetric int8
ENTROPY_BINS, ENTROPY_LEVELS = 2048, 128  # as TensorRT's calibrator has them
ALMOST_NONE = 1e-4  # values in a bin that only clipped ones reach: the divergence stays finite
NARROWEST = 16  # bins that a clip covers at least: fewer tell nothing of the values below it


@dataclass
class Histogram:
    """Magnitudes counted in BINS bins of equal width over [0, 2 ** exponent).

    Attributes:
        counts: float64 [BINS].
        peak: the largest magnitude seen.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    exponent: int = LOWEST
    peak: float = 0.0

    @property
    def width(self) -> float:
        """Of a bin."""
        return float(np.ldexp(1.0, self.exponent)) / BINS

    def add(self, magnitudes: np.ndarray, weight: float = 1.0) -> None:
        """Count finite float32 `magnitudes` >= 0, each as `weight` values."""
        if not magnitudes.size:
            return
        peak = float(magnitudes.max())
        self._widen(int(np.frexp(peak)[1]))  # peak < 2 ** exponent
        self.peak = max(self.peak, peak)
        bins = (magnitudes * np.float64(1 / self.width)).astype(np.int64)  # exact: a power of two
        self.counts += np.bincount(bins, minlength=BINS) * weight

    def _widen(self, exponent: int) -> None:
        if exponent <= self.exponent:
            return
        together = min(BINS, 2 ** min(exponent - self.exponent, BINS.bit_length()))
        sums = self.counts.reshape(-1, together).sum(axis=1)
        self.counts = np.zeros(BINS)
        self.counts[: len(sums)] = sums
        self.exponent = exponent


def least_squares(histogram: Histogram) -> float:
    """The range of least squared error of symmetric int8, clipping included.

    Values are taken as evenly spread over their bin, and the error's integral over a bin has a closed
    form, so ranges of any size are compared exactly, however many bins a step covers.
    """
    if not histogram.peak:
        return 0.0
    used = int(histogram.peak / histogram.width) + 1
    counts = histogram.counts[:used]
    edges = np.arange(used + 1) * histogram.width

    def error(clip: float) -> float:
        step = clip / LEVELS
        rounded = np.minimum(np.floor(edges / step + 0.5), LEVELS)
        rest = edges / step - rounded
        integral = rounded / 12 + rest * rest * rest / 3  # of the squared error from 0, in steps
        return float(counts @ np.diff(integral)) * step**3

    coarse = _least(error, _falling(histogram.peak, NARROWEST * histogram.width, 2**0.25))
    around = np.linspace(coarse / 2**0.25, min(coarse * 2**0.25, histogram.peak), 17)
    return _least(error, [coarse, *around])


def entropy(histogram: Histogram) -> float:
    """The range whose int8 form diverges least from the distribution (Kullback-Leibler).

    Source: TensorRT's calibrator (Migacz 2017, "8-bit Inference with TensorRT"): what is beyond the
    range is counted at its end, the bins below it are merged to 128 levels, and each level is spread
    over those of its bins that hold anything.
    """
    if not histogram.peak:
        return 0.0
    merged = BINS // ENTROPY_BINS
    counts = histogram.counts.reshape(-1, merged).sum(axis=1)
    width = histogram.width * merged
    used = int(histogram.peak / width) + 1

    def divergence(bins: float) -> float:
        kept = counts[: int(bins)]
        reference = kept.copy()
        reference[-1] += counts[int(bins) :].sum()
        levels = np.arange(len(kept)) * ENTROPY_LEVELS // len(kept)
        filled = kept > 0
        level = np.bincount(levels, kept, ENTROPY_LEVELS)
        members = np.bincount(levels, filled, ENTROPY_LEVELS)
        quantized = np.where(filled, level[levels] / np.maximum(members[levels], 1), ALMOST_NONE)
        there = reference > 0
        p, q = reference[there] / reference.sum(), quantized[there] / max(kept.sum(), ALMOST_NONE)
        return float((p * np.log(p / q)).sum())

    tried = _falling(used, ENTROPY_LEVELS, 2**0.0625)
    best = _least(divergence, (float(round(bins)) for bins in tried))
    return histogram.peak if best == used else best * width


def _falling(start: float, end: float, factor: float) -> Iterator[float]:
    """start, start / factor, ... down to `end`; at least the start."""
    yield start
    while (start := start / factor) >= end:
        yield start


def _least(measure: Callable[[float], float], tried: Iterable[float]) -> float:
    """The candidate of least measure, the first of equals."""
    return min(tried, key=measure)
