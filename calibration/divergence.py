"""How far a language model's next-token distribution is from another's, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Divergence:
    """Over all positions.

    Attributes:
        kl: mean KL divergence of the exact distribution to the found one, nats a token.
        top1_agreement: share of positions whose most likely token is the same.
    """

    kl: float
    top1_agreement: float


def divergence(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Divergence:
    """From (found, exact) logits [..., vocab], pair by pair."""
    divergences, same = [], []
    for found, exact in pairs:
        divergences.append(kl_divergence(log_softmax(found), log_softmax(exact)).ravel())
        same.append((found.argmax(axis=-1) == exact.argmax(axis=-1)).ravel())
    return Divergence(float(np.concatenate(divergences).mean()), float(np.concatenate(same).mean()))


def kl_divergence(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """KL(exact || found) of log-probabilities [..., vocab], in nats: float64 [...]."""
    kl: np.ndarray = (np.exp(exact) * (exact - found)).sum(axis=-1)
    return kl


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [..., vocab] of logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
