"""KL divergence and agreement of next tokens, against numpy written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_edge.calibration.divergence import divergence, kl_divergence, log_softmax


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_it_is_the_mean_over_positions(positions: int, vocab: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    exact = generator.normal(0, 3, (2, 1, positions, vocab)).astype(np.float32)
    found = exact + generator.normal(0, 1, exact.shape).astype(np.float32)
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True)
            for x in (exact, found))  # fmt: skip
    expected = (p * np.log(p / q)).sum(-1).mean()
    apart = divergence(zip(found, exact, strict=True))
    assert apart.kl == pytest.approx(expected, rel=1e-6)
    assert apart.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    shifted = found + 100  # the same distribution
    assert divergence(zip(shifted, exact, strict=True)).kl == pytest.approx(expected, rel=1e-3)
    same = divergence(zip(exact, exact, strict=True))
    assert (same.kl, same.top1_agreement) == (0, 1)


def test_prompts_count_by_their_positions() -> None:
    uniform, sure = np.zeros((3, 2), np.float32), np.array([[0.0, -50.0]] * 3, np.float32)
    apart = divergence([(uniform, sure), (sure[:1], sure[:1])])
    assert apart.kl == pytest.approx(0.75 * np.log(2))
    assert divergence([(-sure, sure), (sure[:1], sure[:1])]).top1_agreement == 0.25


def test_large_logits_neither_overflow_nor_lose_the_tail() -> None:
    logits = np.array([[3e4, 0.0], [-3e4, -3e4]], np.float32)
    logs = log_softmax(logits)
    assert logs.dtype == np.float64
    np.testing.assert_allclose(logs, [[0.0, -3e4], [np.log(0.5), np.log(0.5)]])
    assert kl_divergence(logs, logs).tolist() == [0.0, 0.0]
