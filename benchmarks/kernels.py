"""Our linear kernels beside ONNX Runtime's and beside the machine's limits.

    python -m vlm_edge.benchmarks.kernels [--rows 1 200 577] [--shape 576x1536 ...]

Kernels of a shape run in turn, one round after another, so that a slow moment meets all of them;
figures are medians. For one row the weights are read from memory: a model holds as many copies of the
layer as exceed the last cache. Both limits are measured between the rounds, with as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_edge.benchmarks import onnx_bytes
from vlm_edge.benchmarks.machine import describe, usable_cores
from vlm_edge.benchmarks.onnx_bytes import Node
from vlm_edge.benchmarks.operators import Subject, open_graph, time_in_turn
from vlm_edge.runtime import native

if TYPE_CHECKING:
    from rich.table import Table

ROWS = (1, 200, 577)
SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152),  # SmolLM2-135M
          (896, 896), (896, 4864), (4864, 896), (896, 151936))  # Qwen2-0.5B  # fmt: skip
BEYOND_CACHE = 100_000_000  # bytes of weights in a model for one row
ROUND_READ, ROUND_DOT = 256 << 20, 500_000  # bytes and loops of a measurement of the limits
DOT_OPERATIONS = 16 * 64 * 2  # of one loop of vlm_edge_dot
DOMAINS = {"": 21, "com.microsoft": 1, native.DOMAIN: 1}


@dataclass(frozen=True)
class Built:
    """One layer: nodes from x to y, with constants; `read` is the bytes that a pass has to read."""

    nodes: list[Node]
    constants: dict[str, np.ndarray]

    @property
    def read(self) -> int:
        return sum(array.nbytes for array in self.constants.values())


def _block(k: int) -> int:
    return 128 if k % 128 == 0 else 64


def _own(bits: int, k: int, n: int, block: int | None, i: int, rng: np.random.Generator) -> Built:
    constants = {
        f"w{i}": rng.integers(0, 256, (k, n * bits // 8), np.uint8),
        f"s{i}": np.full((n,) if block is None else (k // block, n), 0.01, np.float32),
    }
    inputs = ["x", "", "", "", "", *constants]  # no norm, its bias, factor, residual
    return Built([Node("Linears", inputs, [f"y{i}"], native.DOMAIN, {"bits": [bits]})], constants)


def _n_bits(bits: int, k: int, n: int, block: int, i: int, rng: np.random.Generator) -> Built:
    blocks = -(-k // block)
    constants = {
        f"w{i}": rng.integers(0, 256, (n, blocks, block * bits // 8), np.uint8),
        f"s{i}": np.full(n * blocks, 0.01, np.float32),
    }
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = Node("MatMulNBits", ["x", *constants], [f"y{i}"], "com.microsoft", attributes)
    return Built([node], constants)


def _static(k: int, n: int, i: int, rng: np.random.Generator) -> Built:
    """W8A8 as the CPU lowering has it: u8 activations of one scale, s8 weights of one a column."""
    constants = {
        f"w{i}": rng.integers(-127, 128, (k, n), np.int8),
        f"xs{i}": np.array(0.03, np.float32),
        f"s{i}": np.full(n, 0.01, np.float32),
        f"xz{i}": np.array(128, np.uint8),
        f"z{i}": np.zeros(n, np.int8),
    }
    product = [f"q{i}", f"w{i}", f"xs{i}", f"s{i}", f"xz{i}", f"z{i}"]
    nodes = [
        Node("QuantizeLinear", ["x", f"xs{i}", f"xz{i}"], [f"q{i}"]),
        Node("MatMulIntegerToFloat", product, [f"y{i}"], "com.microsoft"),
    ]
    return Built(nodes, constants)


KERNELS: dict[str, Callable[[int, int, int, np.random.Generator], Built]] = {
    "Linears-8, a scale a column": lambda k, n, i, r: _own(8, k, n, None, i, r),
    "MatMulIntegerToFloat": _static,
    "Linears-8, blocks": lambda k, n, i, r: _own(8, k, n, _block(k), i, r),
    "MatMulNBits-8": lambda k, n, i, r: _n_bits(8, k, n, _block(k), i, r),
    "Linears-4, blocks of 32": lambda k, n, i, r: _own(4, k, n, 32, i, r),
    "MatMulNBits-4": lambda k, n, i, r: _n_bits(4, k, n, 32, i, r),
}


def subject(name: str, k: int, n: int, rows: int, threads: int) -> Subject:
    """A session with copies of the layer, each with weights of its own."""
    rng = np.random.default_rng(0)
    layers: list[Built] = []
    while not layers or (rows == 1 and sum(each.read for each in layers) < BEYOND_CACHE):
        layers.append(KERNELS[name](k, n, len(layers), rng))
    content = onnx_bytes.model(
        [node for each in layers for node in each.nodes],
        {"x": (np.float32, ("rows", k))},
        {f"y{i}": (np.float32, ("rows", n)) for i in range(len(layers))},
        {name: array for each in layers for name, array in each.constants.items()},
        DOMAINS,
    )
    session = open_graph(content, threads)
    binding = session.io_binding()
    binding.bind_cpu_input("x", rng.standard_normal((rows, k), dtype=np.float32))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return Subject(name, session, binding, len(layers), layers[0].read)


class Limits:
    """Bytes read and 8-bit operations done a second by all threads together, in millions of them."""

    def __init__(self, threads: int) -> None:
        library = ctypes.CDLL(str(native.library()))
        self._read, self._dot = library.vlm_edge_read, library.vlm_edge_dot
        self._read.argtypes, self._dot.argtypes = (
            (ctypes.c_void_p, ctypes.c_size_t),
            (ctypes.c_size_t,),
        )
        self._memory = np.ones(ROUND_READ, np.uint8)
        self._threads, self._pool = threads, ThreadPoolExecutor(threads)
        self.read: list[float] = []
        self.dot: list[float] = []

    def run(self) -> None:
        part = ROUND_READ // self._threads // 256 * 256
        start = self._memory.ctypes.data
        seconds = self._time(lambda i: self._read(start + i * part, part))
        self.read.append(part * self._threads / seconds)
        seconds = self._time(lambda _: self._dot(ROUND_DOT))
        self.dot.append(ROUND_DOT * DOT_OPERATIONS * self._threads / seconds)

    def _time(self, work: Callable[[int], Any]) -> float:
        start = time.perf_counter()
        list(self._pool.map(work, range(self._threads)))
        return time.perf_counter() - start


def measure(k: int, n: int, rows: int, threads: int, rounds: int, limits: Limits) -> list[Subject]:
    subjects = [subject(name, k, n, rows, threads) for name in KERNELS]
    time_in_turn(subjects, rounds, limits.run)
    return subjects


def add_rows(
    table: Table, subjects: Sequence[Subject], k: int, n: int, rows: int, limits: Limits
) -> None:
    """Ours and ONNX Runtime's stand in pairs; the ratio is ours over the one below."""
    read, dot = statistics.median(limits.read), statistics.median(limits.dot)
    for i, each in enumerate(subjects):
        ratio = f"{subjects[i + 1].median / each.median:.2f}" if i % 2 == 0 else ""
        moved, done = each.read / each.median, 2 * rows * k * n / each.median
        table.add_row(
            f"{rows} x {k} x {n}" if i == 0 else "",
            each.name,
            f"{each.median * 1e6:.1f}",
            f"{moved / 1e9:.1f} ({moved / read:.0%})",
            f"{done / 1e9:.0f} ({done / dot:.0%})",
            ratio,
            end_section=i == len(subjects) - 1,
        )


def shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return int(k), int(n)


def main(arguments: Sequence[str] | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x")
    parser.add_argument("--shape", type=shape, nargs="+", default=SHAPES, help="K x N, as 576x1536")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    if native.library() is None:
        parser.exit(1, "our kernels were not built here: pip install . needs a C++ compiler\n")
    limits = Limits(given.threads)
    table = Table(title="rows x K x N", title_justify="left")
    for heading in ("shape", "kernel", "µs", "GB/s", "GOP/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for rows in given.rows:
        for k, n in given.shape:
            if rows > 1 and n > 10_000:
                continue  # a language model's head sees one row
            subjects = measure(k, n, rows, given.threads, given.rounds, limits)
            add_rows(table, subjects, k, n, rows, limits)
    read, dot = statistics.median(limits.read) / 1e9, statistics.median(limits.dot) / 1e9
    table.caption = (
        f"{describe()['name']}, {given.threads} threads; "
        f"limits: reading {read:.1f} GB/s, INT8 {dot:.0f} GOP/s"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
