"""Power and energy of what runs, sampled beside it.

The thread reads a few small files, or a line of a child process, ten times a second in the process that
waits for the measured one. Energy is the area under the readings (trapezoids), so it includes what the
machine takes when idle; that is measured before and reported beside it, never subtracted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlm_edge.benchmarks.power_sources import Source, Unreadable, find

INTERVAL = 0.1  # s between readings
START = 5.0  # s in which the first reading comes: a child process takes its time
IDLE = 2.0  # s of rest before anything is loaded
GAP = 1.0  # s without a reading, after which the energy is unknown
SHORTEST = 3 * INTERVAL  # of a stretch that is measured: fewer readings say little


@dataclass(frozen=True)
class Reading:
    """Power at a time of `time.monotonic`, which all processes share."""

    at: float
    watts: float


class Meter:
    """Readings of a source in a thread; without a source it answers that nothing is known.

    Attributes:
        reason: why there are no figures; None while there are.
        idle_w: mean power before anything was loaded.
    """

    def __init__(self, source: Source | None, reason: str | None = None) -> None:
        self.source, self.reason = source, reason
        self.idle_w: float | None = None
        self._readings: list[Reading] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin, with a rest that tells the power of the idle machine."""
        if self.source is None:
            return
        self._thread.start()
        deadline = time.monotonic() + START
        while not self._readings and self._thread.is_alive() and time.monotonic() < deadline:
            self._done.wait(INTERVAL / 2)
        begin = time.monotonic()
        self._done.wait(IDLE + 2 * INTERVAL)
        spent = self.energy(begin, begin + IDLE)
        self.idle_w = None if spent is None else spent / IDLE

    def settle(self) -> None:
        """Wait for a reading behind all that ran, which its energy needs."""
        end = time.monotonic() + INTERVAL
        while self._thread.is_alive() and time.monotonic() < end + GAP:
            if self._readings and self._readings[-1].at > end:
                return
            time.sleep(INTERVAL / 2)

    def energy(self, begin: float, end: float) -> float | None:
        """Joules between two times of `time.monotonic`; None where the readings do not tell."""
        return energy(self._readings, begin, end)

    def close(self) -> None:
        self._done.set()
        if self.source is not None:
            self.source.close()
        if self._thread.is_alive():
            self._thread.join(timeout=GAP)

    def about(self, found: bool) -> dict[str, object]:
        """What the report says of the figures; `found`: are there any?"""
        source = self.source
        if not found and self.reason is None:
            self.reason = f"the runs were shorter than {SHORTEST:g} s, or readings failed to come"
        return {
            "source": source and source.name,
            "covers": source and source.covers,
            "interval_ms": round(1000 * INTERVAL) if source else None,
            "idle_w": self.idle_w and float(f"{self.idle_w:.4g}"),
            "reason": self.reason,
        }

    def _watch(self) -> None:
        assert self.source is not None
        while not self._done.is_set():
            try:
                watts = self.source.read()
            except (OSError, EOFError, ValueError) as error:
                if not self._done.is_set():
                    self.reason = f"the readings ended: {error}"
                return
            self._readings.append(Reading(time.monotonic(), watts))
            if not self.source.paced:
                self._done.wait(INTERVAL)


def energy(readings: Sequence[Reading], begin: float, end: float) -> float | None:
    """Joules between two times, by trapezoids; at both ends power is interpolated.

    None where the stretch is shorter than `SHORTEST`, begins before the first reading, ends behind the
    last, or has a gap.
    """
    after = next((i for i, reading in enumerate(readings) if reading.at > begin), len(readings))
    last = next((i for i, reading in enumerate(readings) if reading.at >= end), len(readings))
    if end - begin < SHORTEST or after == 0 or last == len(readings):
        return None
    joules = 0.0
    for left, right in zip(readings[after - 1 : last], readings[after : last + 1], strict=True):
        if right.at - left.at > GAP:
            return None
        a, b = max(left.at, begin), min(right.at, end)
        slope = (right.watts - left.watts) / (right.at - left.at)
        middle = left.watts + slope * ((a + b) / 2 - left.at)
        joules += middle * (b - a)
    return joules


@contextmanager
def metering(device: str, root: Path = Path("/")) -> Iterator[Meter]:
    """A meter that runs within the block."""
    try:
        meter = Meter(find(device, root))
    except Unreadable as error:
        meter = Meter(None, str(error))
    with contextlib.closing(meter):
        meter.start()
        yield meter
