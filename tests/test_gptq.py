"""GPTQ loses less at the output than rounding to nearest, and equals it where inputs are unrelated."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_edge.calibration import gptq
from vlm_edge.export.quantizers import best_scales

LOW, HIGH = -8, 7


def scales(block: np.ndarray) -> np.ndarray:
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
        weight, gptq.factor(np.eye(64, dtype=np.float32)), 32, scales, LOW, HIGH
    )
    np.testing.assert_allclose(restored(values, chosen, 32), nearest(weight, 32), atol=1e-6)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((30, 12))
    hessian = x.T @ x
    upper = gptq.factor(hessian.astype(np.float32)).astype(np.float64)
    damped = hessian + gptq.DAMPING * np.mean(np.diag(hessian)) * np.eye(12)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(12), atol=1e-4)
    assert np.array_equal(upper, np.triu(upper))


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x = np.random.default_rng(2).standard_normal((50, 32)).astype(np.float32)
    x[:, 5] = 0
    weight = np.ones((32, 3), np.float32)
    values, chosen = gptq.quantize(weight, gptq.factor(x.T @ x), 32, scales, LOW, HIGH)
    assert np.isfinite(restored(values, chosen, 32)).all()
