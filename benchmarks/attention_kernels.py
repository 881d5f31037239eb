"""Our attention operators beside ONNX Runtime's, at the shapes of real models.

    python -m vlm_edge.benchmarks.attention_kernels [--rounds 9] [--only decode]

Operators of a shape run in turn, one round after another; figures are medians and, for a
busy machine, the best. The cache is as long as
the context, which is the best case of the standard operators: they compute the whole width.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_edge.benchmarks import onnx_bytes
from vlm_edge.benchmarks.machine import describe, usable_cores
from vlm_edge.benchmarks.onnx_bytes import Node
from vlm_edge.benchmarks.operators import Subject, open_graph, time_in_turn
from vlm_edge.runtime import native

DOMAINS = {"": 24, "com.microsoft": 1, native.DOMAIN: 1}


@dataclass(frozen=True)
class Shape:
    name: str
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    start: int | None = None  # None: no cache, every query sees every key

    @property
    def context(self) -> int:
        return (self.start or 0) + self.queries

    @property
    def operations(self) -> int:
        """Of the products that are needed: two for each channel of each key that a query sees."""
        seen = self.queries * self.context
        if self.start is not None:
            seen -= self.queries * (self.queries - 1) // 2
        return 4 * seen * self.heads * self.head_dim


SHAPES = (
    Shape("CLIP-L/14-336", 577, 16, 16, 64),
    Shape("SigLIP-B/16-512", 1024, 12, 12, 64),
    Shape("SigLIP-so400m", 729, 16, 16, 72),
    Shape("DINOv2-S", 257, 6, 6, 64),
    Shape("SmolLM2-135M prefill", 200, 9, 3, 64, 0),
    Shape("SmolLM2-135M prefill", 200, 9, 3, 64, 400),
    Shape("SmolLM2-135M prefill", 200, 9, 3, 64, 4000),
    Shape("Qwen2-0.5B prefill", 200, 14, 2, 64, 400),
    Shape("Llama-7B prefill", 200, 32, 32, 128, 400),
    Shape("SmolLM2-135M decode", 1, 9, 3, 64, 100),
    Shape("SmolLM2-135M decode", 1, 9, 3, 64, 600),
    Shape("SmolLM2-135M decode", 1, 9, 3, 64, 4000),
    Shape("Qwen2-0.5B decode", 1, 14, 2, 64, 600),
    Shape("Llama-7B decode", 1, 32, 32, 128, 600),
)


def arrays(shape: Shape) -> dict[str, np.ndarray]:
    """Inputs of all forms of the operator; heads_* are [1, heads, tokens, head_dim]."""
    rng = np.random.default_rng(0)

    def random(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, dtype=np.float32)

    s, hd, start = shape.queries, shape.head_dim, shape.start or 0
    angles = random(1, shape.context, hd // 2)
    mask = np.arange(shape.context) <= start + np.arange(s)[:, None]
    past = (1, shape.kv_heads, shape.context, hd)
    return {
        "q": random(1, s, shape.heads * hd),
        "k": random(1, s, shape.kv_heads * hd),
        "v": random(1, s, shape.kv_heads * hd),
        "heads_q": random(1, shape.heads, s, hd),
        "heads_k": random(1, shape.kv_heads, s, hd),
        "heads_v": random(1, shape.kv_heads, s, hd),
        "cos": np.cos(angles[:, start:]),
        "sin": np.sin(angles[:, start:]),
        "all_cos": np.cos(angles[0]),
        "all_sin": np.sin(angles[0]),
        "past_key": random(*past),
        "past_value": random(*past),
        "start": np.array([start], np.int64),
        "last": np.array([shape.context - 1], np.int32),
        "total": np.array([shape.context], np.int32),
        "mask": np.where(mask, 0, -np.inf).astype(np.float32)[None, None],
    }


def forms(shape: Shape) -> Mapping[str, list[Node]]:
    """The same attention as our operator, and as ONNX Runtime has it."""
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    if shape.start is None:
        standard = {"q_num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
        return {
            "ours": [Node("Attention", ["q", "k", "v"], ["y"], native.DOMAIN, heads)],
            "Attention-23": [Node("Attention", ["q", "k", "v"], ["y"], attributes=standard)],
        }
    past, present = ["past_key", "past_value"], ["present_key", "present_value"]
    grouped = ["q", "k", "v", *past, "last", "total", "all_cos", "all_sin"]
    return {
        "ours": [
            Node(
                "CachedAttention",
                ["q", "k", "v", "cos", "sin", *past, "start"],
                ["y", *present],
                native.DOMAIN,
                heads,
            )
        ],
        "GroupQueryAttention": [
            Node(
                "GroupQueryAttention",
                grouped,
                ["y", *present],
                "com.microsoft",
                {**heads, "do_rotary": 1},
            )
        ],
        "Attention-24 with a mask": [  # without the transposes around it
            Node("RotaryEmbedding", ["heads_q", "cos", "sin"], ["rotated_q"]),
            Node("RotaryEmbedding", ["heads_k", "cos", "sin"], ["rotated_k"]),
            Node(
                "TensorScatter",
                ["past_key", "rotated_k", "start"],
                ["present_key"],
                attributes={"axis": 2},
            ),
            Node(
                "TensorScatter",
                ["past_value", "heads_v", "start"],
                ["present_value"],
                attributes={"axis": 2},
            ),
            Node("Attention", ["rotated_q", *present, "mask"], ["y"]),
        ],
    }


def subject(
    name: str, nodes: Sequence[Node], inputs: Mapping[str, np.ndarray], threads: int
) -> Subject:
    used = {
        key: array for key, array in inputs.items() if any(key in node.inputs for node in nodes)
    }
    caches = {"past_key": "present_key", "past_value": "present_value"}
    four = "heads_q" in used
    y = tuple(f"y{i}" for i in range(4 if four else 3))
    outputs: dict[str, Any] = {"y": (np.float32, y)}
    outputs |= {new: (np.float32, inputs[old].shape) for old, new in caches.items() if old in used}
    # A symbolic batch, as in a bundle's graph.
    dims = {
        key: ("batch", *array.shape[1:]) if array.ndim > 2 else array.shape
        for key, array in used.items()
    }
    content = onnx_bytes.model(
        nodes,
        {key: (array.dtype.type, dims[key]) for key, array in used.items()},
        outputs,
        {},
        DOMAINS,
    )
    session = open_graph(content, threads)
    import onnxruntime  # `open_graph` says what to do where it is missing

    binding = session.io_binding()
    for key, array in used.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())
        binding.bind_ortvalue_input(key, value)
        if key in caches:
            binding.bind_ortvalue_output(caches[key], value)
    binding.bind_output("y")
    return Subject(name, session, binding)


def main(arguments: Sequence[str] | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose name has this")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    if native.library() is None:
        parser.exit(1, "our kernels were not built here: pip install . needs a C++ compiler\n")
    table = Table(
        caption=f"{describe()['name']}, {given.threads} threads; GFLOP/s and ratio to ours: of the best"
    )
    for heading in ("shape", "tokens", "operator", "ms", "best", "GFLOP/s", "ratio"):
        table.add_column(heading, justify="left" if heading in ("shape", "operator") else "right")
    for shape in (each for each in SHAPES if given.only in each.name):
        inputs = arrays(shape)
        subjects = [
            subject(name, nodes, inputs, given.threads) for name, nodes in forms(shape).items()
        ]
        time_in_turn(subjects, given.rounds)
        for i, each in enumerate(subjects):
            tokens = (
                f"{shape.queries}" if shape.start is None else f"{shape.queries} at {shape.start}"
            )
            table.add_row(
                *((shape.name, tokens) if i == 0 else ("", "")),
                each.name,
                f"{each.median * 1e3:.3f}",
                f"{each.best * 1e3:.3f}",
                f"{shape.operations / each.best / 1e9:.0f}",
                f"{each.best / subjects[0].best:.2f}",
                end_section=i == len(subjects) - 1,
            )
    Console().print(table)


if __name__ == "__main__":
    main()
