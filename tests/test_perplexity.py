"""Perplexity, KL divergence and agreement are those of their definitions, over transformers' own logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from reference import Reference

from vlm_edge.benchmarks import perplexity
from vlm_edge.benchmarks.perplexity import LanguageModel, Score, held_out_text, measure, windows
from vlm_edge.calibration.data import load
from vlm_edge.errors import SettingError

TEXT = "a cat is on the mat; one bird, two birds. What is it?\n\nIt is a bird. " * 6


@pytest.mark.parametrize("case", ["clip-llama", "siglip-qwen2", "clip-mistral-window"])
def test_perplexity_is_that_of_transformers(
    case: str, bundle: Callable[..., Path], reference: Callable[[str], Reference]
) -> None:
    import torch

    model = LanguageModel(bundle(case), threads=1)
    (score,) = measure([model], TEXT, window=40)
    losses = []
    with torch.inference_mode():
        for ids in windows(model.tokenizer.encode(TEXT), 40):
            ids = torch.from_numpy(ids)
            logits = reference(case).model(input_ids=ids[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    expected = torch.cat(losses)
    assert score.tokens == len(expected)
    assert score.perplexity == pytest.approx(float(expected.double().mean().exp()), rel=1e-4)
    assert (score.kl, score.same) == (0, score.tokens)


def test_score_over_parts_is_that_of_the_whole() -> None:
    generator = np.random.default_rng(0)
    logits, reference = generator.standard_normal((2, 9, 7)).astype(np.float32)
    targets = generator.integers(0, 7, 9)
    score = Score()
    for part in (slice(0, 4), slice(4, 9)):
        score.add(logits[part], reference[part], targets[part])
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(1, keepdims=True)
            for x in (reference, logits))  # fmt: skip
    assert score.perplexity == pytest.approx(np.exp(-np.log(q[np.arange(9), targets]).mean()))
    figures = score.figures(score)
    assert figures["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert figures["top1_agreement"] == pytest.approx(np.mean(p.argmax(1) == q.argmax(1)))
    assert figures["ratio"] == 1


def test_fewer_bits_are_further_away(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """The command on three bundles; its figures as a file."""
    paths = [str(bundle("clip-llama", kind)) for kind in ("fp32", "int8", "int4")]
    text, out = tmp_path / "t.txt", tmp_path / "o.json"
    text.write_text(TEXT)
    result = CliRunner().invoke(
        perplexity.main, [*paths, "--text", str(text), "--window", "50", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    exact, int8, int4 = report["bundles"].values()
    assert exact["kl"] == 0
    assert exact["ratio"] == exact["top1_agreement"] == 1
    assert 0 < int8["kl"] < int4["kl"]
    assert report["tokens"] > 100
    assert f"{report['tokens']} predicted tokens" in result.output


def test_windows_cover_the_text_once() -> None:
    for length, count in ((4, 9), (4, 8), (5, 4), (2, 2)):
        pieces = list(windows(list(range(count)), length))
        joined = np.concatenate(pieces)
        np.testing.assert_array_equal(joined, np.arange(len(joined)))
        assert count - len(joined) in (0, 1)  # one token left over predicts nothing
        assert all(2 <= len(piece) <= length for piece in pieces)


def test_what_cannot_be_compared_is_refused(bundle: Callable[..., Path]) -> None:
    first = LanguageModel(bundle("clip-llama"), threads=1)
    with pytest.raises(SettingError, match=r"has [01] token"):
        measure([first], "")
    other = LanguageModel(bundle("siglip-qwen2"), threads=1)
    with pytest.raises(SettingError, match="another tokenizer"):
        measure([first, other], TEXT)


def test_the_built_in_text_is_prose_that_no_export_calibrates_on() -> None:
    text = held_out_text()
    assert 50_000 < len(text) < 100_000
    assert text.isascii()
    paragraphs = set(text.strip().split("\n\n"))
    calibration = {prompt.text for prompt in load(None).prompts}
    sentences = {s for p in paragraphs for s in p.split(". ") if len(s) > 40}
    assert len(sentences) > 300
    assert not any(s in text for s in calibration if len(s) > 40)
    assert not any(s in c for s in sentences for c in calibration)
