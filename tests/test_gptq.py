"""GPTQ loses less at the output than rounding to nearest, and equals it where inputs are unrelated."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_edge.calibration import gptq
from vlm_edge.export.quantizers.rounding import best_scales

LOW, HIGH = -8, 7


def scales(block: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return gptq.weighted_scales(block, costs, LOW, HIGH)


def unweighted(block: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return best_scales(block[None], 4)[0, 0]


def nearest(weight: np.ndarray, block: int) -> np.ndarray:
    grouped = weight.reshape(-1, block, weight.shape[1])
    scale = best_scales(grouped, 4)
    return (np.clip(np.rint(grouped / scale), LOW, HIGH) * scale).reshape(weight.shape)


def restored(values: np.ndarray, chosen: np.ndarray, block: int) -> np.ndarray:
    return values * np.repeat(chosen, block, axis=0)


@pytest.mark.parametrize(("inputs", "outputs", "block"), [(96, 40, 32), (48, 17, 16), (40, 5, 40)])
def test_the_output_error_shrinks_on_related_inputs(inputs: int, outputs: int, block: int) -> None:
    random = np.random.default_rng(inputs)
    mixing = random.standard_normal((inputs // 4, inputs))
    x = random.standard_normal((2000, inputs // 4)) @ mixing
    x = (x + 0.1 * random.standard_normal(x.shape)).astype(np.float32)
    weight = random.standard_normal((inputs, outputs)).astype(np.float32)
    values, chosen = gptq.quantize(weight, gptq.factor(x.T @ x), block, scales, LOW, HIGH)
    assert values.min() >= LOW
    assert values.max() <= HIGH
    assert chosen.shape == (inputs // block, outputs)

    def error(rounded: np.ndarray) -> float:
        return float(np.linalg.norm(x @ (rounded - weight)))

    assert error(restored(values, chosen, block)) < 0.7 * error(nearest(weight, block))


def test_unrelated_inputs_are_rounded_to_nearest() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 9)).astype(np.float32)
    values, chosen = gptq.quantize(
        weight, gptq.factor(np.eye(64, dtype=np.float32)), 32, unweighted, LOW, HIGH
    )
    np.testing.assert_allclose(restored(values, chosen, 32), nearest(weight, 32), atol=1e-6)


@pytest.mark.parametrize("width", [1, 12, 300, 777])
def test_the_factor_is_that_of_the_damped_inverse(width: int) -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((width * 3, width))
    hessian = x.T @ x
    upper = gptq.factor(hessian.astype(np.float32)).astype(np.float64)
    damped = hessian + gptq.DAMPING * np.mean(np.diag(hessian)) * np.eye(width)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(width), atol=1e-4)
    assert np.array_equal(upper, np.triu(upper))
    assert (np.diag(upper) > 0).all()


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x = np.random.default_rng(2).standard_normal((50, 32)).astype(np.float32)
    x[:, 5] = 0
    weight = np.ones((32, 3), np.float32)
    values, chosen = gptq.quantize(weight, gptq.factor(x.T @ x), 32, scales, LOW, HIGH)
    assert np.isfinite(restored(values, chosen, 32)).all()


# -- scales and refinement --------------------------------------------------------------------


def uneven(inputs: int, count: int = 3000) -> np.ndarray:
    """float32 [count, in]: related inputs, a few of them a hundred times as large."""
    random = np.random.default_rng(inputs)
    x = random.standard_normal((count, inputs // 3)) @ random.standard_normal((inputs // 3, inputs))
    x += 0.2 * random.standard_normal(x.shape)
    x[:, 3::29] *= 100
    return x.astype(np.float32)


def product_error(x: np.ndarray, weight: np.ndarray, found: tuple[np.ndarray, np.ndarray]) -> float:
    values, chosen = found
    block = len(values) // len(chosen)
    off = x.astype(np.float64) @ (restored(values, chosen, block) - weight)
    return float(np.linalg.norm(off) / np.linalg.norm(x.astype(np.float64) @ weight))


def test_weighted_scales_are_the_best_of_those_tried() -> None:
    random = np.random.default_rng(0)
    block, costs = random.standard_normal((16, 9)), random.uniform(0.1, 50, 16)
    block, costs = block.astype(np.float32), costs.astype(np.float32)

    def cost(scale: np.ndarray) -> np.ndarray:
        off = np.clip(np.rint(block / scale), LOW, HIGH) * scale - block
        return costs @ off**2

    found = cost(gptq.weighted_scales(block, costs, LOW, HIGH))
    peak = np.abs(block).max(axis=0) / HIGH
    for shrink in gptq.SHRINKS:
        assert (found <= cost(peak * shrink) * 1.0001).all()
    assert (gptq.weighted_scales(np.zeros((16, 9), np.float32), costs, LOW, HIGH) > 0).all()


def test_weighing_errors_pays_where_inputs_differ() -> None:
    x = uneven(96)
    weight = np.random.default_rng(5).standard_normal((96, 20)).astype(np.float32)
    upper = gptq.factor(x.T @ x)
    weighted, plain = (
        product_error(x, weight, gptq.quantize(weight, upper, 32, choose, LOW, HIGH))
        for choose in (scales, unweighted)
    )
    assert weighted < 0.8 * plain


@pytest.mark.parametrize(("inputs", "outputs", "block"), [(96, 40, 32), (48, 7, 16), (45, 6, 45)])
def test_refinement_only_helps(inputs: int, outputs: int, block: int) -> None:
    x = uneven(inputs)
    hessian = x.T @ x
    weight = np.random.default_rng(outputs).standard_normal((inputs, outputs)).astype(np.float32)
    weight[:block, 0] = 0  # a block whose values are all zero has no best scale
    found = gptq.quantize(weight, gptq.factor(hessian), block, scales, LOW, HIGH)
    better = gptq.refine(weight, hessian, *found, LOW, HIGH)
    assert product_error(x, weight, better) < 0.97 * product_error(x, weight, found)
    values, chosen = better
    assert values.min() >= LOW and values.max() <= HIGH
    assert np.array_equal(values, np.rint(values))
    assert (chosen > 0).all() and np.isfinite(chosen).all()


def test_the_scales_are_the_least_squares_ones() -> None:
    x = uneven(64)
    hessian = (x.T @ x).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((64, 3)).astype(np.float32)
    found = gptq.quantize(weight, gptq.factor(hessian), 32, scales, LOW, HIGH)
    values, chosen = gptq.refine(weight, hessian, *found, LOW, HIGH)
    damping = np.sqrt(gptq.DAMPING * np.diag(hessian).mean())
    x = np.concatenate([x, damping * np.eye(64, dtype=np.float32)])
    for output in range(3):  # columns of the inputs' products with one block's values each
        parts = np.stack([x[:, :32] @ values[:32, output], x[:, 32:] @ values[32:, output]], axis=1)
        best, *_ = np.linalg.lstsq(parts.astype(float), x.astype(float) @ weight[:, output])
        np.testing.assert_allclose(chosen[:, output], best, rtol=1e-3)
