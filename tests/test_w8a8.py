"""W8A8 of a language model: static where it can be, portable Q/DQ, within its budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graph import ref, run, write_product
from test_weight_only import DATA, LENGTHS, quiet

from vlm_edge.export import w8a8
from vlm_edge.export.examples import Example, Examples
from vlm_edge.export.pipeline import read_model
from vlm_edge.export.w8a8 import W8A8, write_w8a8


def written(checkpoint: Path, folder: Path) -> dict[str, Any]:
    _, model, _ = read_model(checkpoint)
    generator = np.random.default_rng(5)
    every = [
        Example(generator.standard_normal((1, length, model.decoder.width)).astype(np.float32))
        for length in LENGTHS
    ]
    examples = Examples.split(model.decoder, every, DATA.held_out_prompts)
    (folder / "scratch").mkdir(parents=True)
    return write_w8a8("llm", model.parts["llm"], examples, folder, folder / "scratch", quiet)


def static_products(graph: ir.Graph) -> set[str]:
    """Names of the layers (q_proj, ...) whose activations pass a Q/DQ pair."""
    found = set()
    for node in graph:
        if node.op_type == "MatMul":
            before, weight = (value.producer() for value in node.inputs)
            if before is not None and before.op_type == "DequantizeLinear" and weight is not None:
                name = weight.inputs[0].name
                found.add(next(p for p in name.split(".") if p.endswith("_proj")))
    return found


@pytest.mark.parametrize("case", ["clip-mistral-window", "siglip-qwen2", "clip-llama-biases"])
@pytest.mark.parametrize(
    ("budget", "static"),
    [
        (1e9, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        (0.0, set()),
    ],
)
def test_layers_are_static_as_the_budget_allows(
    budget: float, static: set[str], case: str, checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(w8a8, "BUDGET", budget)
    said = written(checkpoint(case), tmp_path / "b")
    path = tmp_path / "b" / "llm.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    assert static_products(graph) == static
    assert len(said["tried"]) == (1 if budget else len(w8a8.STEPS))
    assert 0 < said["kl"] < 0.2
    assert said["kl"] == said["tried"][-1]["kl"]
    # TensorRT's form: signed activations around zero; and nothing is left to divide inputs by.
    quantized = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert bool(quantized) == bool(static)
    for node in quantized:
        zero = node.inputs[2].producer().attributes["value"].as_tensor().numpy()
        assert zero.dtype == np.int8 and not zero.any()
    smoothed = {node.inputs[1].name for node in graph if node.op_type == "Mul"}
    assert not any(name and name.endswith(".smooth") for name in smoothed)


def test_each_kind_of_layer_is_stored_as_it_says(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((24, 256)).astype(np.float32)
    x = generator.standard_normal((9, 256)).astype(np.float32)
    smoothing = {name: generator.uniform(0.5, 2, 256).astype(np.float32) for name in ("a", "b")}
    quantizer = W8A8({"a": float(np.abs(x / smoothing["a"]).max())}, smoothing)
    for name, axis in (("a", (24,)), ("b", (2, 24))):
        path = write_product(
            tmp_path / f"{name}.onnx", quantizer.product(name, ref(weight)), 256, 24
        )
        scales = [v.shape for n, v in ir.load(path).graph.initializers.items() if "scale" in n]
        assert [tuple(shape) for shape in scales] == [axis]
        (y,) = run(path, {"x": x})
        off = np.linalg.norm(y - x @ weight.T) / np.linalg.norm(x @ weight.T)
        assert off < 0.03
