"""The comparison of quantizers: its data, its measures and its rounds, on a tiny model and without NNCF."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vlm_edge.benchmarks import quantizers
from vlm_edge.benchmarks import quantizers_subjects as subjects
from vlm_edge.benchmarks.latency import WorkerFailed
from vlm_edge.benchmarks.quantizers_subjects import NncfWorker, Row, Task
from vlm_edge.calibration import data as calibration_data

CASE = "dinov2-llama"


@pytest.fixture(scope="module")
def work(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose bundles are there already."""
    folder = tmp_path_factory.mktemp("work")
    for precision in quantizers.BUNDLES:
        shutil.copytree(bundle(CASE, precision), folder / precision)
    return folder


@pytest.fixture(scope="module")
def tasks(work: Path) -> dict[str, Task]:
    made = subjects.tasks(work / "fp32", calibration_data.load(None))
    return {task.part: task for task in made}


def test_what_is_measured_calibrates_nothing(tasks: dict[str, Task]) -> None:
    data = calibration_data.load(None)
    assert list(tasks) == ["vision", "connector", "llm"]
    for task in tasks.values():
        assert task.held_out and task.used
        assert sorted([*task.used, *task.held_out]) == list(range(task.count))
    assert tasks["vision"].count == tasks["connector"].count == len(data.paths)
    assert tasks["llm"].count == len(data.prompts)
    assert tasks["vision"].held_out == data.held_out
    assert tasks["llm"].held_out == data.held_out_prompts


def test_parts_are_fed_in_pipeline_order(tasks: dict[str, Task]) -> None:
    vision = subjects.OrtSubject(tasks["vision"], tasks["vision"].graph)
    _, features = vision.run(5, keep=True)
    np.testing.assert_array_equal(tasks["connector"].feeds(5)["features"], features)
    assert vision.run(5, keep=False)[1] is None
    feeds = tasks["llm"].feeds(0)
    count = feeds["inputs_embeds"].shape[1]
    assert list(feeds["logit_positions"]) == list(range(max(0, count - subjects.LAST), count))


def test_feed_files_leave_empty_caches_out(tasks: dict[str, Task], tmp_path: Path) -> None:
    stored = dict(np.load(subjects.feed_file(tasks["llm"], 3, tmp_path)))
    feeds = tasks["llm"].feeds(3)
    assert stored.keys() == {name for name in feeds if not name.startswith("past.")} < feeds.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(value, feeds[name])


def task_of(kind: Any, count: int = 4) -> Task:
    size = {0: 1, 1: 9, 2: 2, 3: 3}
    return Task("part", kind, Path(), "y", lambda i: {"x": np.zeros(size[i])}, count, (0, 1, 3))


def test_errors_of_features() -> None:
    task, reference = task_of("features"), np.array([[[3.0, 4.0]]], np.float32)
    assert quantizers.errors(task, [reference], [reference]) == {
        "cosine": pytest.approx(1),
        "relative_error": 0,
    }
    found = quantizers.errors(task, [np.array([[[4.0, 3.0]]])], [reference])
    assert found["cosine"] == pytest.approx(24 / 25)
    assert found["relative_error"] == pytest.approx(2**0.5 / 5)


def test_errors_of_logits() -> None:
    reference = np.log(np.array([[[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]]))
    other = (
        np.log(np.array([[[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]])) + 3
    )  # a constant changes nothing
    found = quantizers.errors(task_of("logits"), [other], [reference])
    kl = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found == {"kl": pytest.approx(kl / 2), "top1_agreement": 0.5}


class Fake:
    """A subject that notes its runs and answers with its number."""

    def __init__(self, number: float, log: list[tuple[float, int, bool]]) -> None:
        self.number, self.log = number, log

    def run(self, index: int, keep: bool) -> tuple[float, np.ndarray | None]:
        self.log.append((self.number, index, keep))
        return len(self.log), np.full((1, 1, 2), self.number) if keep else None


def test_rounds_are_interleaved_and_the_warm_up_is_dropped() -> None:
    log: list[tuple[float, int, bool]] = []
    pairs = [(Row("tool", str(n), "f32", 1.0, None), Fake(n, log)) for n in (1.0, 2.0)]
    rows = quantizers.measure(task_of("features"), pairs, runs=3, warmup=1)
    kept, timed = log[:6], log[6:]
    assert kept == [(n, i, True) for n in (1.0, 2.0) for i in (0, 1, 3)]
    turns = [(1.0, 1, False)] * 2 + [(2.0, 1, False)] * 2  # item 1 is the largest
    assert timed == turns * 4
    assert rows[0].error["relative_error"] == 0
    assert rows[1].error["relative_error"] == pytest.approx(1)  # twice the first, the reference
    assert rows[0].ms is not None and rows[0].ms.median == 15  # of 11, 15 and 19
    assert rows[1].ms is not None and rows[1].ms.median == 17


def test_without_runs_nothing_is_timed() -> None:
    log: list[tuple[float, int, bool]] = []
    (row,) = quantizers.measure(
        task_of("features"), [(Row("t", "r", "f32", 1.0, None), Fake(1, log))], runs=0
    )
    assert row.ms is None
    assert all(keep for _, _, keep in log)


def test_a_quantized_model_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> float:
        made.append(1)
        return 2.5

    assert subjects.once(tmp_path / "x.onnx", make) == 2.5
    assert subjects.once(tmp_path / "x.onnx", make) == 2.5
    assert made == [1]


def test_bundles_that_are_there_are_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "manifest.json").write_text("{}")
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command[3:]))
    assert list(quantizers.export("model", tmp_path, Path("pictures"))) == ["fp32", "int8", "int4"]
    assert calls == [
        ["export", "model", f"--{p}", "-o", str(tmp_path / p), "--calibration-images", "pictures"]
        for p in ("int8", "int4")
    ]


@pytest.mark.parametrize("part", ["connector", "llm"])
def test_the_whole_script(
    part: str, work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnx")
    report = tmp_path / "report.json"
    arguments = ["--work", str(work), "--part", part, "--runs", "2", "--json", str(report)]
    result = CliRunner().invoke(quantizers.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    (rows,) = json.loads(report.read_text(encoding="utf-8"))["parts"].values()
    tools = [row["tool"] for row in rows]
    assert set(tools) == {"vlm-edge", "ONNX Runtime"}
    recipes = {"connector": 2 + 5, "llm": 3 + 3}  # k-quant has no form for widths such as 72
    assert len(rows) == recipes[part]
    assert ("INT4 k-quant, block 32 of ONNX Runtime fails" in caplog.text) == (part == "llm")
    assert rows[0]["recipe"] == "full precision"
    assert all(row["ms"]["median"] > 0 and row["size_mb"] > 0 for row in rows)
    quantized = [row["error"] for row in rows[1:]]
    if part == "llm":
        assert rows[0]["error"] == {"kl": 0, "top1_agreement": 1}
        by_recipe = {row["recipe"]: row["error"]["kl"] for row in rows}
        assert 0 < by_recipe["vlm export --int8"] < by_recipe["INT4 nearest, block 32"]
    else:
        assert rows[0]["error"]["relative_error"] == 0
        assert all(0 < error["relative_error"] < 0.2 for error in quantized)
    assert all(row["made_s"] is None for row in rows if row["tool"] == "vlm-edge")


@pytest.mark.parametrize(
    ("says", "sentence"),
    [("echo '{\"error\": \"no such model\", \"traceback\": \"\"}'", "NNCF: no such model"),
     ("exit 3", "ended with code 3")],
)  # fmt: skip
def test_a_worker_that_fails_says_so(says: str, sentence: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{says}\n", encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(WorkerFailed, match=sentence):
        NncfWorker(python)
