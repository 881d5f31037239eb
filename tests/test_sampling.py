"""The sampler against transformers' logits processors, and the stop strings against the whole text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_edge.errors import EngineFailure, SettingError
from vlm_edge.runtime import sampling
from vlm_edge.runtime.sampling import Sampler, StopStrings


def theirs(logits: np.ndarray, ids: list[int], **kwargs: Any) -> np.ndarray:
    """The scores [vocab] after transformers' processors in the order `generate` uses; -inf is out."""
    import torch
    from transformers.generation import logits_process as lp

    scores, tokens = torch.tensor(logits)[None], torch.tensor([ids])
    steps: list[Any] = []
    if kwargs.get("repetition_penalty", 1.0) != 1.0:
        steps.append(lp.RepetitionPenaltyLogitsProcessor(kwargs["repetition_penalty"]))
    if kwargs.get("temperature", 1.0) != 1.0:
        steps.append(lp.TemperatureLogitsWarper(kwargs["temperature"]))
    if kwargs.get("top_k", 0):
        steps.append(lp.TopKLogitsWarper(kwargs["top_k"]))
    if kwargs.get("top_p", 1.0) < 1:
        steps.append(lp.TopPLogitsWarper(kwargs["top_p"]))
    for step in steps:
        scores = step(tokens, scores)
    return scores[0].numpy()


def ours(logits: np.ndarray, ids: list[int], **kwargs: Any) -> np.ndarray:
    sampler = Sampler(**{"temperature": 1.0} | kwargs)
    kept, scores = sampler._warped(sampler._penalized(logits, ids))
    full = np.full(logits.shape, -np.inf, dtype=np.float32)
    full[kept] = scores
    return full


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.1},
    {"top_k": 1},
    {"top_k": 7, "temperature": 0.3},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 1.5},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 40, "top_p": 0.95},
]


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
@pytest.mark.parametrize(("vocab", "spread"), [(11, 2.0), (700, 0.01), (700, 4.0), (5000, 1.5)])
def test_scores_equal_transformers(kwargs: dict[str, Any], vocab: int, spread: float) -> None:
    random = np.random.default_rng(vocab)
    for _ in range(5):
        logits = (random.standard_normal(vocab) * spread).astype(np.float32)
        ids = random.integers(0, vocab, 30).tolist()
        before = logits.copy()
        np.testing.assert_array_equal(ours(logits, ids, **kwargs), theirs(logits, ids, **kwargs))
        np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("kwargs", [k for k in SETTINGS if "temperature" not in k], ids=str)
def test_equal_scores(kwargs: dict[str, Any]) -> None:
    """torch's sort leaves equals in any order, so as many stay, and ours are the first of them."""
    random = np.random.default_rng(1)
    for vocab in (40, 3000):
        logits = random.integers(-3, 4, vocab).astype(np.float32)
        found = ours(logits, [0, 1, 1], **kwargs)
        expected = theirs(logits, [0, 1, 1], **kwargs)
        np.testing.assert_array_equal(np.sort(found), np.sort(expected))
        lowest = found[np.isfinite(found)].min()
        untouched = np.arange(vocab) > 1
        equals = np.flatnonzero((logits == lowest) & untouched)
        stays = np.isfinite(found[equals])
        assert not np.any(np.diff(stays.astype(int)) > 0)


def test_a_small_first_look_finds_the_same_nucleus(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    logits = random.standard_normal(3000).astype(np.float32)
    whole = {p: ours(logits, [], top_p=p) for p in (0.01, 0.3, 0.8, 0.99)}
    monkeypatch.setattr(sampling, "NUCLEUS_START", 1)
    for p, expected in whole.items():
        np.testing.assert_array_equal(ours(logits, [], top_p=p), expected)


def test_greedy_is_the_first_maximum() -> None:
    logits = np.array([0.0, 3.0, 3.0, -1.0], dtype=np.float32)
    assert Sampler().pick(logits, []) == 1
    assert Sampler(temperature=0, top_k=1, top_p=0.1, seed=3).pick(logits, [2]) == 1
    assert Sampler(repetition_penalty=2.0).pick(logits, [1, 1]) == 2
    assert Sampler(repetition_penalty=2.0).pick(-logits - 1, [0]) == 3  # -1 becomes -2
    assert Sampler(temperature=1e-30, seed=0).pick(logits, []) == 1


def test_ids_beyond_the_logits_are_no_repetition() -> None:
    logits = np.array([1.0, 2.0], dtype=np.float32)
    assert Sampler(repetition_penalty=3.0).pick(logits, [-200, 7, 2]) == 1


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    draws = [Sampler(temperature=1.0, seed=5).pick(logits, []) for _ in range(3)]
    assert len(set(draws)) == 1
    sampler = Sampler(temperature=1.0, seed=5)
    counts = np.bincount([sampler.pick(logits, []) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    cut = Sampler(temperature=1.0, top_k=2, seed=6)
    counts = np.bincount([cut.pick(logits, []) for _ in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_overflown_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0], dtype=np.float32)
    with pytest.raises(EngineFailure, match=str(bad)):
        Sampler(temperature=temperature).pick(logits, [])


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], dtype=np.float32)
    sampler = Sampler(temperature=5.0, top_p=0.9)
    assert {sampler.pick(logits, []) for _ in range(20)} == {1}
    with pytest.raises(EngineFailure):
        sampler.pick(np.full(3, -np.inf, dtype=np.float32), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", v) for v in (-0.1, float("nan"), float("inf"), "0.5", None, True)),
        *(("top_p", v) for v in (0, -1, 1.1, float("nan"))),
        *(("top_k", v) for v in (-1, 2.5, float("inf"))),
        *(("repetition_penalty", v) for v in (0, -2, float("inf"))),
        *(("seed", v) for v in (-1, 1.5, "x")),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"{name} = .*should be a"):
        Sampler(**{name: value})


# -- stop strings -----------------------------------------------------------------------------


def test_stop_strings() -> None:
    stop = StopStrings(["\nUSER:", "###"])
    assert stop.push("A red") == "A red"
    assert stop.push(" roof.\n") == " roof."
    assert stop.push("US") == ""
    assert stop.push("B stick") == "\nUSB stick"
    assert not stop.stopped
    assert stop.push("#") == ""
    assert stop.push("# ##") == "## "
    assert stop.push("# and more") == ""
    assert stop.stopped
    assert stop.push("never") + stop.flush() == ""


def test_held_text_comes_when_nothing_follows() -> None:
    stop = StopStrings("###")
    assert stop.push("a##") + "|" + stop.flush() == "a|##"
    assert StopStrings().push("anything") == "anything"


@pytest.mark.parametrize("bad", ["", ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(bad: Any) -> None:
    with pytest.raises(SettingError, match="stop"):
        StopStrings(bad)


letters = st.text(alphabet="ab", max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(letters, max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
)
def test_cutting_into_pieces_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    # The stop string that is complete first ends the text; of several, the one that began first.
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    stream = StopStrings(stops)
    found = "".join(stream.push(piece) for piece in pieces) + stream.flush()
    assert found == expected
    assert stream.stopped == bool(ends)
