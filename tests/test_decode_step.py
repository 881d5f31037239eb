"""The share of a decode step that is Python's: what is slow outside the engine counts, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner

from vlm_edge.benchmarks import decode_step
from vlm_edge.benchmarks.decode_step import Steps, measure
from vlm_edge.errors import SettingError
from vlm_edge.runtime import ort_decoder
from vlm_edge.runtime.sampling import Sampler

SLOW_MS = 5.0


@pytest.fixture
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("clip-llama", "int8")


def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(SLOW_MS / 1000)
        return function(*args)

    return slow


def test_a_slow_sampler_is_pythons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = measure(folder, 9, 1, threads=1)
    monkeypatch.setattr(Sampler, "pick", slowed(Sampler.pick))
    (after,) = measure(folder, 9, 1, threads=1)
    assert after.python_us > 1000 * SLOW_MS
    assert after.engine_ms < SLOW_MS
    assert after.share > max(before.share, 0.5)


def test_a_slow_engine_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(session, "run_with_iobinding", slowed(session.run_with_iobinding))
    (steps,) = measure(folder, 9, 1, threads=1)
    assert steps.engine_ms > SLOW_MS
    assert steps.python_us < 1000 * SLOW_MS
    assert steps.share < 0.5


def test_growths_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_decoder, "ROOM", ort_decoder.STEP)
    for new_tokens, growths in ((4, 0), (40, 1), (80, 2)):
        found = measure(folder, new_tokens, runs=2, prompt_tokens=60, threads=1, warmup=0)
        assert [steps.growths for steps in found] == [growths, growths]


def test_the_figures_of_a_step() -> None:
    steps = Steps(whole_ms=5.0, engine_ms=4.9, growths=0)
    assert steps.python_us == pytest.approx(100)
    assert steps.share == pytest.approx(0.02)


def test_one_token_has_no_step(folder: Path) -> None:
    with pytest.raises(SettingError, match="new_tokens = 1; .* at least 2"):
        measure(folder, new_tokens=1, runs=1)


def test_the_table_has_a_row_a_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--new-tokens", "5", "--runs", "2", "--threads", "1"]
    ran = CliRunner().invoke(decode_step.main, [str(folder), str(folder), *options])
    assert ran.exit_code == 0, ran.output
    assert ran.output.count("clip-llama-int8") == 2
    assert "means over 4 steps, medians of 2 answers" in ran.output
