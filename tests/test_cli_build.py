"""`vlm build` and `vlm export --target`: what reaches the builder, the tables, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from vlm_edge.cli import build as command
from vlm_edge.cli import export as export_command
from vlm_edge.cli import options
from vlm_edge.cli.guard import sentence
from vlm_edge.cli.main import cli
from vlm_edge.errors import BuildFailed, DeviceUnavailable
from vlm_edge.export import layer_times
from vlm_edge.export.pipeline import Target
from vlm_edge.export.tensorrt import build
from vlm_edge.export.tensorrt.build import BuildOptions, BuildReport, EngineReport
from vlm_edge.export.tensorrt.worker import Done
from vlm_edge.runtime.manifest import read_manifest
from vlm_edge.runtime.plans import FloatType, PlanProfile
from vlm_edge.runtime.trt import MODULES

CHANGED = {"compute_capability": ("8.6", "12.0")}
REPORT = BuildReport(
    Path("plans"), "tensorrt-rtx 1.7", "12.0", PlanProfile("float16", 640, 256),
    (
        EngineReport("vision", "int8", 2_500_000, 12.34, CHANGED, Done(17, 18, 300 * 10**6, unpacked=2)),
        EngineReport("connector", "fp32", 1_000, 1.0, CHANGED, Done(0, 0, 0)),
        EngineReport("media_kv", "int8", 1_000, 1.0, {}, Done(None, 8, 0)),
        EngineReport("llm", "int4", 9_000_000, 7.0, {}, None),
    ),
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `build` is called with; it answers REPORT."""
    calls: list[tuple[Any, ...]] = []

    def fake(*arguments: Any) -> BuildReport:
        calls.append(arguments[:5])
        arguments[5]("build vision", 1, 6)
        return REPORT

    monkeypatch.setattr(build, "build", fake)
    return calls


def vlm(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments)


def test_choices_are_those_of_the_library() -> None:
    assert tuple(MODULES) == command.DEVICES
    assert get_args(FloatType) == options.FLOATS
    assert get_args(Target) == export_command.TARGETS


def test_options_reach_the_builder(calls: list[tuple[Any, ...]]) -> None:
    assert vlm("build", "b", "--device", "tensorrt").exit_code == 0
    given = (
        "--capacity 100 --chunk 20 --tiles 3 --images 4 --float float32 --workspace 50 -o p "
        "--compute-capability 8.6 --device tensorrt-rtx"
    ).split()
    assert vlm("build", "b", *given).exit_code == 0
    default, asked = calls
    assert default == (Path("b"), "tensorrt", None, None, BuildOptions())
    options = BuildOptions("float32", 100, 20, 3, 4, 50_000_000)
    assert asked == (Path("b"), "tensorrt-rtx", "8.6", Path("p"), options)


def test_the_table(calls: list[tuple[Any, ...]]) -> None:
    result = vlm("build", "b", "--device", "tensorrt-rtx", "-o", "p")
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines()
    ]
    assert ["vision", "int8", "2.5", "12.3", "17 of 18", "300"] in rows
    assert ["connector", "fp32", "0.0", "1.0", "", ""] in rows
    assert ["media_kv", "int8", "0.0", "1.0", "? of 8", ""] in rows
    assert ["llm", "int4", "9.0", "kept", "", ""] in rows
    assert "vision, connector: built anew: compute_capability was 8.6, is 12.0\n" in result.stdout
    assert (
        "tensorrt-rtx 1.7, compute capability 12.0, float_type float16, capacity 640"
        in result.stdout
    )
    assert "vlm run b PICTURE -p QUESTION --device tensorrt-rtx --plans p\n" in result.stdout
    spaced = vlm("build", "my b", "--device", "tensorrt-rtx", "-o", "my p").stdout
    assert "vlm run 'my b' PICTURE -p QUESTION --device tensorrt-rtx --plans 'my p'\n" in spaced
    assert "2 INT8 weights are in blocks, as the CPU wants them: vision makes" in result.stderr
    assert "build vision ..." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["b"], "--device"),
        (["b", "--device", "cuda"], "'tensorrt', 'tensorrt-rtx'"),
        (["b", "--device", "tensorrt", "--capacity", "0"], "--capacity"),
        (["b", "--device", "tensorrt", "--float", "bfloat16"], "'float16', 'float32'"),
    ],
)
def test_wrong_options(arguments: list[str], said: str) -> None:
    result = vlm("build", *arguments)
    assert result.exit_code == 2 and said in result.stderr


def test_a_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BuildFailed("llm", "operator Foo of node_1: no such thing; try another")

    monkeypatch.setattr(build, "build", fail)
    result = vlm("build", "b", "--device", "tensorrt-rtx", "--compute-capability", "8.6")
    assert result.exit_code == 1
    sentence = (
        "error: TensorRT did not build llm: operator Foo of node_1: no such thing; try another\n"
    )
    assert result.stderr.endswith(sentence)


# -- vlm export --target ----------------------------------------------------------------------


def test_export_for_tensorrt(
    calls: list[tuple[Any, ...]],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No layer is timed, the manifest says so, and the engines are built."""

    def measure(*_: Any) -> None:
        raise AssertionError("a layer was timed on this machine")

    monkeypatch.setattr(layer_times, "measure", measure)
    monkeypatch.setattr(build, "find_target", lambda device, asked: None)
    out = tmp_path / "out"
    given = ["--int8", "-o", str(out), "--target", "tensorrt-rtx", "--compute-capability", "8.6"]
    result = vlm("export", str(checkpoint("clip-llama")), *given, "--method", "minmax")
    assert result.exit_code == 0, result.stderr
    assert calls == [(out, "tensorrt-rtx", "8.6", None, None)]
    said = read_manifest(out).calibration or {}
    assert said["target"] == "tensorrt-rtx"
    for part in ("vision", "connector", "llm"):
        rows = said["parts"][part]["layers"].values()
        assert rows and {"int8"} == {row["precision"] for row in rows}
        assert not any(key.startswith("ms") for row in rows for key in row)
    sentence = "Quantized for tensorrt-rtx, by their errors alone"
    assert sentence in result.stdout and "not faster" not in result.stdout
    told = vlm("info", str(out), "--layers")
    assert sentence in told.stdout and "q_proj" in told.stdout
    assert (
        json.loads(vlm("info", str(out), "--layers", "--json").stdout)["measured_for"]
        == "tensorrt-rtx"
    )


def test_a_budget_holds_without_times(
    calls: list[tuple[Any, ...]],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that err most go back to float."""
    monkeypatch.setattr(build, "find_target", lambda device, asked: None)
    out = tmp_path / "out"
    source = str(checkpoint("clip-llama"))
    given = ["--precision", "vision=int8", "--target", "tensorrt", "--method", "minmax"]
    assert vlm("export", source, "-o", str(out), *given, "--max-error", "10").exit_code == 0
    part = (read_manifest(out).calibration or {})["parts"]["vision"]
    half = str(part["relative_error"] / 2)
    assert vlm("export", source, "-o", str(out), *given, "--max-error", half).exit_code == 0
    part = (read_manifest(out).calibration or {})["parts"]["vision"]
    assert part["relative_error"] <= float(half)
    kept = {row["error"] for row in part["layers"].values() if row["precision"] == "fp32"}
    quantized = {row["error"] for row in part["layers"].values() if row["precision"] == "int8"}
    assert kept and quantized and min(kept) >= max(quantized)
    assert {row.get("reason") for row in part["layers"].values()} == {"budget", None}


def test_an_absent_device_is_found_before_the_export(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(device: str, asked: str | None) -> None:
        raise DeviceUnavailable(device, "there is no GPU")

    monkeypatch.setattr(build, "find_target", absent)
    out = tmp_path / "out"
    result = vlm("export", str(checkpoint("clip-llama")), "-o", str(out), "--target", "tensorrt")
    assert result.exit_code == 1 and "there is no GPU" in result.stderr
    assert not out.exists()


def test_a_compute_capability_is_tensorrts() -> None:
    result = vlm("export", "x", "--compute-capability", "8.6")
    assert result.exit_code == 2 and "belongs to --target" in result.stderr


def test_an_int8_cache_is_refused_before_the_export() -> None:
    result = vlm("export", "x", "--target", "tensorrt", "--kv-cache", "int8")
    assert result.exit_code == 2 and "TensorRT has no int8 cache" in result.stderr


@pytest.mark.parametrize(
    ("name", "extra"), [("build", "tensorrt"), ("plan", "tensorrt"), ("export", "export")]
)
def test_a_missing_module_names_the_leanest_extra(name: str, extra: str) -> None:
    said = sentence(ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir"), name)
    assert f"'vlm-edge[{extra}]'" in said
