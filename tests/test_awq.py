"""Scales before rounding: chosen where they pay, exact but for the rounding, and folded away for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import ref, run, write

from vlm_edge.calibration import awq, gptq
from vlm_edge.export import fold
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.layers.linear import RMSNorm
from vlm_edge.export.quantizers.weight_only import WeightOnly

LOW, HIGH, BLOCK = -8, 7, 32


def inputs_of(kind: str, width: int = 64, count: int = 4000) -> np.ndarray:
    """[count, width]: all channels alike, or one in each block a hundred times as large."""
    x = np.random.default_rng(1).standard_normal((count, width)).astype(np.float32)
    if kind == "outliers":
        x[:, ::BLOCK] *= 100
    return x


def product_error(x: np.ndarray, weight: np.ndarray, scales: np.ndarray | None) -> float:
    """Relative error of x @ weight once the weight is rounded, scaled by `scales` meanwhile."""
    factors = np.ones(len(weight), np.float32) if scales is None else scales
    scaled = weight * factors[:, None]
    costs = np.ones(BLOCK, np.float32)
    restored = np.empty_like(weight)
    for start in range(0, len(weight), BLOCK):
        rows = scaled[start : start + BLOCK]
        step = gptq.weighted_scales(rows, costs, LOW, HIGH)
        restored[start : start + BLOCK] = np.clip(np.rint(rows / step), LOW, HIGH) * step
    off = x @ (restored / factors[:, None] - weight)
    return float(np.linalg.norm(off) / np.linalg.norm(x @ weight))


def scales_for(x: np.ndarray, *weights: np.ndarray) -> np.ndarray | None:
    hessian = x.T @ x
    return awq.scales(hessian, gptq.factor(hessian), list(weights), BLOCK, LOW, HIGH)


def test_large_inputs_get_finer_weights() -> None:
    x = inputs_of("outliers")
    weight = np.random.default_rng(2).standard_normal((64, 24)).astype(np.float32)
    scales = scales_for(x, weight)
    assert scales is not None
    assert scales[::BLOCK].min() > 2 * np.delete(scales, [0, 32]).max()
    assert product_error(x, weight, scales) < 0.75 * product_error(x, weight, None)


def test_where_all_inputs_are_alike_nothing_is_scaled() -> None:
    weight = np.random.default_rng(2).standard_normal((64, 24)).astype(np.float32)
    scales = scales_for(inputs_of("even"), weight)
    assert scales is None or scales.max() / scales.min() < 1.05


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x = inputs_of("outliers")
    x[:, 7] = 0
    scales = scales_for(x, np.ones((64, 5), np.float32))
    assert scales is None or np.isfinite(scales).all()


# -- in the graph -----------------------------------------------------------------------------


class Tensors:
    """A checkpoint of given arrays."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = {name.replace("__", "."): a for name, a in arrays.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str, shape: Any) -> Any:
        return ref(self.arrays[name], name)


def feed_forward(
    weights: dict[str, np.ndarray], norm: np.ndarray, quantizer: WeightOnly, folded: bool
) -> Any:
    """norm -> (gate, up) -> down as Llama has it; whether multiplications are folded."""
    tensors: Any = Weights(Tensors(norm__weight=norm), "norm")  # type: ignore[arg-type]
    before = RMSNorm(tensors, len(norm), 1e-5)
    before._set_name("norm")
    products = {name: quantizer.product(name, ref(w, name)) for name, w in weights.items()}
    for name, product in products.items():
        product._set_name(name)

    def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
        h = before(op, x["x"])
        gated = op.Mul(op.Sigmoid(products["gate"](op, h)), products["up"](op, h))
        y = products["down"](op, gated)
        if folded:
            assert fold.into_norms(op.builder.graph) == 1
            assert fold.into_products(op.builder.graph) == 1
        return [y]

    return forward


@pytest.mark.parametrize("bits", [8, 4])
def test_folding_changes_nothing(bits: int, tmp_path: Path) -> None:
    """Every input scaled: the result is that of the graph left unfolded and near that of full precision,
    and no multiplication is left."""
    generator = np.random.default_rng(bits)
    width, hidden = 32, 64
    w = {n: generator.standard_normal(s).astype(np.float32) for n, s in
         (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden)))}  # fmt: skip
    norm = generator.uniform(0.5, 2, width).astype(np.float32)
    first = generator.uniform(0.7, 1.4, width).astype(np.float32)
    second = generator.uniform(0.7, 1.4, hidden).astype(np.float32)
    smoothing = {"gate": first, "up": first, "down": second}
    x = generator.standard_normal((9, width)).astype(np.float32)
    results, muls = [], []
    for folded in (False, True):
        path = write(
            tmp_path / f"{folded}.onnx", feed_forward(w, norm, WeightOnly(bits, 32, smoothing=smoothing), folded),
            {"x": ("float32", ("n", width))}, {"y": ("float32", ("n", width))},
        )  # fmt: skip
        results += run(path, {"x": x}, session__qdq_matmulnbits_accuracy_level="0")
        muls.append(sum(node.op_type == "Mul" for node in ir.load(path).graph))
    assert muls == [3, 1]  # the gate's own is left
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-4)
    h = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * norm
    gated = 1 / (1 + np.exp(-h @ w["gate"].T)) * (h @ w["up"].T)
    exact = gated @ w["down"].T
    off = np.linalg.norm(results[1] - exact) / np.linalg.norm(exact)
    assert off < (0.02 if bits == 8 else 0.25)


def test_a_product_with_another_reader_keeps_its_scales(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    quantizer = WeightOnly(8, 16, smoothing={"down": np.full(16, 2, np.float32)})
    up, down = (
        quantizer.product("up", ref(values, "up")),
        quantizer.product("down", ref(values, "d")),
    )
    up._set_name("up")
    down._set_name("down")
    folded = []

    def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
        inner = up(op, x["x"])
        y = down(op, op.Mul(x["x"], inner))
        y = op.Add(y, inner)
        folded.append(fold.into_products(op.builder.graph))
        return [y]

    path = write(tmp_path / "g.onnx", forward, {"x": ("float32", ("n", 16))},
                 {"y": ("float32", ("n", 16))})  # fmt: skip
    assert folded == [0]
    x = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    (y,) = run(path, {"x": x}, session__qdq_matmulnbits_accuracy_level="0")
    inner = x @ values.T
    np.testing.assert_allclose(y, (x * inner) @ values.T + inner, rtol=0.05, atol=0.3)
