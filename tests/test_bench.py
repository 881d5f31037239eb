"""Benchmarks: the figures' arithmetic, the prompt's length, and the schema of a real run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge.benchmarks import machine
from vlm_edge.benchmarks.filler import fill
from vlm_edge.benchmarks.latency import Settings, measure
from vlm_edge.benchmarks.schema import (
    FIGURES,
    ONCE,
    POWER,
    REPEATED,
    Measured,
    Report,
    Spread,
    spread,
)
from vlm_edge.benchmarks.table import number, table
from vlm_edge.benchmarks.worker import picture
from vlm_edge.cli.main import cli
from vlm_edge.errors import SettingError, VlmEdgeError
from vlm_edge.export.pipeline import export

CASE = "clip-llama"
QUICK = ("--runs", "3", "--warmup", "1", "--new-tokens", "4", "--threads", "1")


def bench(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, args)])


# -- arithmetic -----------------------------------------------------------------------------


def test_percentiles_point_to_the_slow_end() -> None:
    values = [float(v) for v in range(1, 102)]  # 1 .. 101
    assert spread("vision_ms", values) == Spread(51, 91, 100)
    assert spread("decode_tokens_per_s", values) == Spread(51, 11, 2)
    assert spread("vision_ms", []) is None


@given(st.lists(st.floats(0.001, 1e6), min_size=1))
def test_percentiles_are_in_order(values: list[float]) -> None:
    time, rate = spread("ttft_ms", values), spread("decode_tokens_per_s", values)
    assert time is not None
    assert rate is not None
    slack = 1e-9 * max(values)
    assert min(values) - slack <= time.median <= time.p90 + slack <= time.p99 + 2 * slack
    assert rate.p99 - 2 * slack <= rate.p90 - slack <= rate.median <= max(values) + slack


def report(*sides: tuple[float, list[float]]) -> Report:
    """A report whose sides have one load time and some vision times."""
    made = []
    for load_s, times in sides:
        figures: dict[str, Any] = dict.fromkeys(FIGURES)
        figures |= {"load_s": load_s, "vision_ms": spread("vision_ms", times)}
        bundle = {"name": "b", "precisions": {"vision": "int8", "llm": "int4"}}
        made.append(Measured(bundle, {}, figures, [{"vision_ms": t} for t in times]))
    settings = {"prompt_tokens": 9, "visual_tokens": 4, "tiles": 1, "new_tokens": 2, "runs": 3}
    return Report("now", {"name": "a machine"}, settings, *made)


def test_ratios_are_paired_by_run() -> None:
    """Both sides slowed down together, so every pair says the same."""
    ratios = report((1.0, [10, 20, 30]), (2.0, [20, 40, 60])).ratios()
    assert ratios["vision_ms"] == Spread(0.5, 0.5, 0.5)
    assert ratios["load_s"] == 0.5
    assert ratios["decode_tokens_per_s"] is None
    assert set(ratios) == set(FIGURES)


def test_every_figure_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")
    assert [name for name in FIGURES if f"`{name}`" not in text] == []


def test_a_report_alone_has_no_ratios() -> None:
    document = report((1.0, [10.0])).to_json()
    assert "against" not in document
    assert "ratios" not in document
    assert document["connector_ms"] is None


@pytest.mark.parametrize("sides", [1, 2])
def test_table_has_a_row_per_figure(sides: int) -> None:
    made = table(report(*[(1.0, [10.0, 11.0])] * sides))
    assert made.row_count == len(FIGURES) - len(POWER)  # the caption says why there is no power
    assert len(made.columns) == 4
    assert "int4/int8" in str(made.columns[1].header)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.01234, "0.0123"), (99.94, "99.9"), (1234.5, "1,234")]
)
def test_numbers_of_the_table(value: float | None, text: str) -> None:
    assert number(value) == text


# -- prompt ---------------------------------------------------------------------------------


@given(total=st.integers(20, 4000), template=st.integers(0, 10))
def test_fill_reaches_the_count(total: int, template: int) -> None:
    def count(prompt: str) -> int:
        return template + len(prompt.split())

    assert count(fill("what is it?", total, count)) == total


def test_fill_copes_with_words_of_several_tokens() -> None:
    """A tokenizer by characters: only one-character filler can reach any count."""
    for total in range(11, 40):
        assert len(fill("what is it?", total, len)) == total


def test_fill_refuses_what_is_too_small() -> None:
    with pytest.raises(SettingError, match="take 11"):
        fill("what is it?", 10, len)


def test_fill_says_when_no_word_fits() -> None:
    with pytest.raises(SettingError, match="try a number near it"):
        fill("abc", 1000, lambda text: 2 * len(text))


# -- machine --------------------------------------------------------------------------------


def test_machine_is_named() -> None:
    about = machine.describe()
    assert about["cores"] >= 1
    assert about["cpu"] in about["name"]
    assert {"python", "vlm-edge", "numpy"} <= set(machine.versions())


def test_the_drawn_picture_is_always_the_same() -> None:
    assert picture() == picture()
    assert picture()[:2] == b"\xff\xd8"  # JPEG


# -- a real bundle --------------------------------------------------------------------------


def check_figures(side: dict[str, Any], image: bool = True) -> None:
    for name in ONCE:
        assert side[name] > 0
    for name in REPEATED:
        if not image and name in ("preprocess_ms", "vision_ms", "connector_ms"):
            assert side[name] is None
        elif name in POWER:
            continue  # of what the machine lets us read: test_power.py
        else:
            assert set(side[name]) == {"median", "p90", "p99"}
            assert side[name]["median"] > 0


def test_bench_writes_its_schema(bundle: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = bench(bundle(CASE), *QUICK, "--prompt-tokens", "101", "--json", file)
    assert result.exit_code == 0, result.output
    assert "decode, tokens/s" in result.stdout
    document = json.loads(file.read_text())
    check_figures(document)
    assert document["schema"] == 1
    assert document["bundle"]["name"] == f"{CASE}-fp32"
    assert document["bundle"]["architecture"] == "llava"
    assert document["settings"]["prompt_tokens"] == 101
    assert document["settings"]["visual_tokens"] > 0
    assert document["settings"]["new_tokens"] == 4
    assert document["settings"]["grid"] is document["settings"]["limited"] is None  # no choice
    assert document["settings"]["threads"] == 1
    sizes = sum(p.stat().st_size for p in bundle(CASE).rglob("*") if p.is_file())
    assert document["bundle_mb"] == pytest.approx(sizes / 1e6, rel=1e-3)
    assert 20 < document["peak_rss_mb"] < 1000


def test_bench_against_another_bundle(bundle: Callable[..., Path]) -> None:
    result = bench(bundle(CASE, "int8"), "--against", bundle(CASE), *QUICK, "--json", "-")
    document = json.loads(result.stdout)
    check_figures(document["against"])
    assert document["ratios"]["bundle_mb"] < 1
    assert document["ratios"]["decode_tokens_per_s"]["median"] > 0


def test_bench_without_an_image(bundle: Callable[..., Path]) -> None:
    result = bench(bundle(CASE), *QUICK, "--no-image", "--json", "-")
    document = json.loads(result.stdout)
    check_figures(document, image=False)
    assert document["settings"]["visual_tokens"] == 0
    assert document["settings"]["grid"] is None


def test_bench_without_a_chat_template(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The prompt is taken verbatim then, with the image's place in front."""
    folder = shutil.copytree(checkpoint(CASE), tmp_path / "checkpoint")
    (folder / "chat_template.jinja").unlink()
    export(folder, tmp_path / "b")
    document = json.loads(bench(tmp_path / "b", *QUICK, "--json", "-").stdout)
    check_figures(document)
    assert document["settings"]["visual_tokens"] > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--prompt-tokens", "3"), "--prompt-tokens 3 is too small"),
        (("--image", "none.png"), "none.png"),
        (("--new-tokens", "100000"), "100000 new tokens"),
    ],
)
def test_bench_errors_are_one_sentence(
    bundle: Callable[..., Path], args: tuple[str, ...], said: str
) -> None:
    result = bench(bundle(CASE), *QUICK, *args)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in result.stderr


def test_a_worker_that_fails_shows_its_traceback_under_debug(tmp_path: Path) -> None:
    result = bench(tmp_path / "none", *QUICK, "--debug")
    assert result.exit_code == 1
    assert "worker.py" in result.stderr
    assert "is not a bundle" in result.stderr.splitlines()[-1]


def test_every_run_computes_the_image_anew(bundle: Callable[..., Path]) -> None:
    """The image cache must not hide what vision costs."""
    found = measure(bundle(CASE), Settings(new_tokens=2, runs=3, warmup=1, threads=1))
    assert all(sample["vision_ms"] > 0 for sample in found.measured.samples)


def test_a_worker_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(VlmEdgeError, match="ended with code"):
        measure(tmp_path, Settings())
