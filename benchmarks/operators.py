"""Graphs of single operators in sessions of their own, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_edge.errors import ExtraMissing
from vlm_edge.runtime import native


@dataclass
class Subject:
    """A session whose inputs and outputs are bound.

    Attributes:
        copies: of the layer in its graph; times are of one.
        read: bytes that a pass of one has to read; 0 where that is not looked at.
        seconds: of each run.
    """

    name: str
    session: Any
    binding: Any
    copies: int = 1
    read: int = 0
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.seconds.append((time.perf_counter() - start) / self.copies)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def open_graph(content: bytes, threads: int) -> Any:
    """ONNX Runtime's session of a graph that may hold our operators.

    Raises:
        ExtraMissing: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExtraMissing("cpu", "onnxruntime", "measuring kernels") from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Or the threads of one session go on spinning and take the processors from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(native.library()))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def time_in_turn(
    subjects: Sequence[Subject], rounds: int, between: Callable[[], None] = lambda: None
) -> None:
    """Run all of them once a round, then `between`; the first round warms up and does not count."""
    for _ in range(rounds + 1):
        for each in subjects:
            each.run()
        between()
    for each in subjects:
        del each.seconds[0]
