"""Mixed precision: which layers are quantized, that their neighbours in float stay right, and what an
export says of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import nn
from pictures import scene
from safetensors.numpy import load_file, save_file
from small_graph import ref, run, write
from test_sensitivity import case_of, real_error

from vlm_edge.calibration.sensitivity import Unit, single_output
from vlm_edge.cli import layers as tables
from vlm_edge.cli.main import cli
from vlm_edge.errors import CalibrationError, SettingError
from vlm_edge.export import fold, layer_times, mixed, static
from vlm_edge.export.layer_times import Shape, Times
from vlm_edge.export.mixed import Choice, choose
from vlm_edge.export.pipeline import ExportReport, export
from vlm_edge.export.precision import Budgets, PrecisionPlan
from vlm_edge.export.quantizers.static_int8 import StaticInt8
from vlm_edge.export.static import MAX_ERROR  # before conftest replaces it
from vlm_edge.runtime.bundle import Bundle

# -- the choice -------------------------------------------------------------------------------


class Additive:
    """Errors whose `power`s add up, times a factor that the single errors do not know of."""

    def __init__(self, errors: list[float], power: int, factor: float = 1.0) -> None:
        self.errors = {f"l{i}": error for i, error in enumerate(errors)}
        self.units = [Unit((path,), error) for path, error in self.errors.items()]
        self.power, self.factor = power, factor
        self.asked: list[frozenset[str]] = []

    def __call__(self, paths: Collection[str]) -> float:
        self.asked.append(frozenset(paths))
        total = sum(self.errors[path] ** self.power for path in paths) ** (1 / self.power)
        return total * self.factor if len(paths) > 1 else total


sizes = st.lists(st.floats(0.001, 1), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 2), st.sampled_from([0.6, 1.0, 1.7]), st.data())
def test_the_budget_is_met_with_the_fewest_layers_in_float(
    errors: list[float], power: int, factor: float, data: st.DataObject
) -> None:
    error = Additive(errors, power, factor)
    saved = data.draw(st.lists(st.floats(0.1, 10), min_size=len(errors), max_size=len(errors)))
    budget = data.draw(st.floats(0.0005, 3))
    choice = choose(error.units, saved, error, budget, power)
    assert choice.error == (error(choice.quantized) if choice.quantized else 0)
    assert choice.error <= budget
    order = sorted(range(len(errors)), key=lambda i: errors[i] ** power / saved[i], reverse=True)
    fewest = next(
        (k for k in range(len(order)) if error({f"l{i}" for i in order[k:]}) <= budget), None
    )
    if fewest is not None:
        assert choice.quantized == {f"l{i}" for i in order[fewest:]}
    elif min(errors) <= budget:  # not the last of the order, but the one that errs least
        assert choice.error == min(errors)
    else:
        assert not choice.quantized
        assert choice.least == min(errors)
        assert error.errors[choice.least_paths[0]] == min(errors)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 2), st.lists(st.floats(0.0005, 3), min_size=2, max_size=6))
def test_a_larger_budget_never_quantizes_less(
    errors: list[float], power: int, budgets: list[float]
) -> None:
    counts = []
    for budget in sorted(budgets):
        error = Additive(errors, power)
        counts.append(len(choose(error.units, [1.0] * len(errors), error, budget, power).quantized))
    assert counts == sorted(counts)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0, 2.0])
def test_few_assignments_are_tried(budget: float, factor: float) -> None:
    """144 layers: where single errors add up as they should two or three; where they mislead, fewer
    than twice a bisection's."""
    errors = list(np.random.default_rng(0).lognormal(-3, 1, 144))
    error = Additive(errors, 2, factor)
    choice = choose(error.units, [1.0] * 144, error, budget, 2)
    assert len(set(error.asked)) <= (4 if factor == 1 else 14)
    again = Additive(errors, 2, factor)
    assert choose(again.units, [1.0] * 144, again, budget, 2) == choice


def test_time_saved_counts() -> None:
    """Of two layers that err alike the one that saves less goes back to float."""
    error = Additive([0.5, 0.5, 0.1], 2)
    assert choose(error.units, [3.0, 1.0, 1.0], error, 0.6, 2).quantized == {"l0", "l2"}
    assert choose(error.units, [1.0, 3.0, 1.0], error, 0.6, 2).quantized == {"l1", "l2"}


def test_layers_measured_together_stay_together() -> None:
    units = [Unit(("a", "b"), 0.5), Unit(("c",), 0.2)]
    parts = {"a": 0.4, "b": 0.3, "c": 0.2}
    choice = choose(units, [2.0, 1.0], lambda p: sum(parts[x] ** 2 for x in p) ** 0.5, 0.45, 2)
    assert choice.quantized == {"c"}


def test_nothing_gets_faster() -> None:
    assert choose([], [], lambda _: 1.0, 0.1, 2) == Choice(frozenset(), 0.0, float("inf"), ())


# -- mixed readers of one input -----------------------------------------------------------------

WIDTH, OUT, ROWS = 12, 7, 5
READERS = ("q", "k", "v")


class Readers(nn.Module):
    """Three layers that read one input: a norm's output or, without one, the graph's input."""

    def __init__(self, quantizer: StaticInt8, norm: bool, leak: bool) -> None:
        super().__init__("")
        generator = np.random.default_rng(3)
        self.values = {p: generator.normal(0, 1, (OUT, WIDTH)).astype(np.float32) for p in READERS}
        self.gain = generator.normal(1, 0.3, WIDTH).astype(np.float32)
        self.products = nn.ModuleList(
            [quantizer.product(p, ref(self.values[p], p)) for p in READERS]
        )
        for path, part in zip(READERS, self.products, strict=True):
            part._name = path
        self.norm, self.leak = norm, leak

    def forward(self, op: Any, x: ir.Value) -> list[ir.Value]:
        if self.norm:
            gain = op.initializer(ir.Tensor(self.gain), "gain")
            x = op.RMSNormalization(x, gain, axis=-1, epsilon=1e-6)
        outputs = [part(op, x) for part in self.products]
        # What else reads the norm (a selected hidden state) must not see the smoothing.
        return [*outputs, op.Identity(x)] if self.leak else outputs

    def exact(self, x: np.ndarray) -> np.ndarray:
        if self.norm:
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * self.gain
        return x


SMOOTH = np.geomspace(0.2, 5, WIDTH).astype(np.float32)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("norm", "leak"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("kept", list(product([False, True], repeat=3)))
def test_layers_beside_each_other_in_both_precisions(
    kept: tuple[bool, ...], norm: bool, leak: bool, smooth: bool, tmp_path: Path
) -> None:
    """A float layer is exact, whether or not its neighbours had the input smoothed for them; an INT8
    layer gives what it gives among INT8 layers; the division goes into the norm where it can."""
    exact = {path for path, is_kept in zip(READERS, kept, strict=True) if is_kept}
    readers = dict.fromkeys(READERS, "q")
    smoothing = dict.fromkeys(READERS, SMOOTH) if smooth else {}
    base = StaticInt8(dict.fromkeys(READERS, 9.0), smoothing)
    module = Readers(base.keeping(exact, readers), norm, leak)
    names = [*READERS, *(["leak"] if leak else [])]

    def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
        outputs = module(op, x["x"])
        if norm:
            folded.append(fold.into_norms(op.builder.graph))
        return outputs

    folded: list[int] = []
    path = write(
        tmp_path / "g.onnx", forward, {"x": ("float32", ("rows", WIDTH))},
        {name: ("float32", ("rows", WIDTH if name == "leak" else OUT)) for name in names},
    )  # fmt: skip
    x = np.random.default_rng(5).normal(0, 2, (ROWS, WIDTH)).astype(np.float32)
    found = dict(zip(names, run(path, {"x": x}), strict=True))
    inner = module.exact(x)
    for name in READERS:
        weight = module.values[name]
        expected = inner @ weight.T
        if name not in exact:
            factors = SMOOTH if smooth else np.ones(WIDTH, np.float32)
            step = np.float32(9.0 / 127)
            rounded = np.clip(np.rint(inner / factors / step), -128, 127) * step
            scaled = weight * factors
            scale = np.abs(scaled).max(1, keepdims=True) / 127
            expected = rounded @ (np.rint(scaled / scale) * scale).T
            # A value on the edge of a rounding step may fall on its other side.
            close = np.isclose(found[name], expected, rtol=1e-4, atol=1e-4)
            assert close.mean() > 0.9
            np.testing.assert_allclose(found[name], expected, atol=0.5)
        else:
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)
    if leak:
        np.testing.assert_allclose(found["leak"], inner, rtol=1e-5, atol=1e-5)
    graph = ir.load(path).graph
    kinds = [node.op_type for node in graph]
    assert kinds.count("QuantizeLinear") == (len(exact) < 3)  # one pair for all INT8 readers
    smoothed = smooth and len(exact) < 3
    assert kinds.count("Mul") == (smoothed and not (norm and not leak))
    if norm:
        assert folded == [int(smoothed and not leak)]
    if not smoothed:  # nothing is done for the sake of nobody
        assert not any("smooth" in name for name in graph.initializers)


# -- an export --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for index in range(8):
        scene(40 + index, 35, index).save(path / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def outlying(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip-llama with one feed-forward whose hidden activations have a few enormous channels: fc1's
    bias lifts them, fc2's weights are small for them. One scale for all channels then rounds the
    others away."""
    source = shutil.copytree(checkpoint("clip-llama"), tmp_path_factory.mktemp("outliers") / "c")
    weights = load_file(source / "model.safetensors")
    (bias,) = [name for name in weights if re.search(r"vision.*\.1\.mlp\.fc1\.bias$", name)]
    second = bias.replace("fc1.bias", "fc2.weight")
    weights[bias][3:5] = 400
    weights[second][:, 3:5] *= 1e-3
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return source


OUTLIER = "vision_tower.encoder.layers.1.mlp.fc2"


def export_with(
    source: Path, folder: Path, output: Path, max_error: float | None, plan: str = "vision=int8"
) -> ExportReport:
    return export(
        source, output, precision=PrecisionPlan.parse(plan), calibration_images=folder,
        calibration_method="minmax", budgets=Budgets(max_error),
    )  # fmt: skip


def test_the_layer_with_outliers_is_found_and_stays_in_float(
    outlying: Path, folder: Path, tmp_path: Path
) -> None:
    every = export_with(outlying, folder, tmp_path / "every", None).errors["vision"]
    assert {row["precision"] for row in every["layers"].values()} == {"int8"}
    worst = max(every["layers"], key=lambda path: every["layers"][path]["error"])
    assert worst == OUTLIER
    budget = every["relative_error"] / 2
    report = export_with(outlying, folder, tmp_path / "mixed", budget)
    said = report.errors["vision"]
    layers = said["layers"]
    assert said["relative_error"] <= budget == said["max_error"]
    assert report.precisions["vision"] == "int8"
    assert layers[OUTLIER] == {
        "precision": "fp32", "error": every["layers"][OUTLIER]["error"],
        "ms_float": 2.0, "ms_quantized": 1.0, "reason": "budget",
    }  # fmt: skip
    others = [row for path, row in layers.items() if path != OUTLIER]
    assert sum(row["precision"] == "int8" for row in others) >= len(others) - 2
    # The graph is what the report says, and the manifest says it too.
    made = Bundle(tmp_path / "mixed")
    graph = ir.load(made.graph("vision", "cpu")).graph
    quantized = {n.removesuffix(".weight_scale") for n in graph.initializers if "_scale" in n}
    said_quantized = [path for path, row in layers.items() if row["precision"] == "int8"]
    assert len(quantized) == len(said_quantized)
    assert made.manifest.calibration["parts"]["vision"]["layers"] == layers
    pixels = np.random.default_rng(0).standard_normal((1, 3, 30, 30), np.float32)
    (found,), (portable,) = (
        run(tmp_path / "mixed" / name, {"pixel_values": pixels})
        for name in ("vision.cpu.onnx", "vision.onnx")
    )
    np.testing.assert_allclose(found, portable, atol=0.05 * np.abs(portable).max())


def test_a_larger_budget_leaves_fewer_layers_in_float(
    outlying: Path, folder: Path, tmp_path: Path
) -> None:
    counts = []
    for budget in (0.006, 0.012, 0.03, 1.0):
        said = export_with(outlying, folder, tmp_path / "b", budget).errors["vision"]
        assert said["relative_error"] <= budget
        counts.append(sum(row["precision"] == "int8" for row in said["layers"].values()))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 12


@pytest.mark.parametrize("method", ["minmax", "smooth-65"])
def test_a_layer_that_gets_slower_stays_in_float(
    method: str, checkpoint: Callable[[str], Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """fc1 [36 -> 50], whatever the budget. It reads a norm whose other reader there is not: nothing
    of the smoothing is left, and the others are as quantized as ever."""
    monkeypatch.setattr(
        layer_times, "measure",
        lambda shape, *_: Times(1.0, 3.0) if shape.outputs == 50 else Times(2.0, 1.0),
    )  # fmt: skip
    report = export(
        checkpoint("clip-llama"), tmp_path / "b", precision=PrecisionPlan.parse("vision=int8"),
        calibration_images=folder, calibration_method=method, budgets=Budgets(5.0),
    )  # fmt: skip
    for path, row in report.errors["vision"]["layers"].items():
        slow = path.endswith("fc1")
        assert (row["precision"], row.get("reason")) == (
            ("fp32", "not faster") if slow else ("int8", None)
        )
        assert (row["ms_float"], row["ms_quantized"]) == ((1.0, 3.0) if slow else (2.0, 1.0))
        assert row["error"] > 0  # it is known all the same
    graph = ir.load(tmp_path / "b" / "vision.onnx").graph
    weights = [n for n in graph if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer()]
    assert len(weights) == 10
    assert 0 < report.errors["vision"]["relative_error"] < 0.2


def test_a_part_in_which_nothing_gets_faster_is_written_in_full_precision(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Even with a budget of the user's own: it is met."""
    monkeypatch.setattr(layer_times, "measure", lambda *_: Times(1.0, 1.0))
    plan = "vision=int8,connector=int8"
    report = export_with(checkpoint("clip-llama"), folder, tmp_path / "b", 0.01, plan)
    assert report.precisions == {"vision": "fp32", "connector": "fp32", "llm": "fp32"}
    made, exact = Bundle(tmp_path / "b"), Bundle(bundle("clip-llama"))
    for part in ("vision", "connector"):
        assert made.manifest.engines[part].precision == "fp32"
        assert made.manifest.engines[part].lowered.keys() == {"cuda"}
        for name in (f"{part}.onnx", f"{part}.data"):
            assert made.manifest.files[name].sha256 == exact.manifest.files[name].sha256
        said = report.errors[part]
        assert {row["reason"] for row in said["layers"].values()} == {"not faster"}
        assert said["relative_error"] < 1e-5


def test_a_budget_that_no_assignment_meets(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    """One sentence with the least error and the way out; the older bundle stays, nothing half."""
    older = shutil.copytree(bundle("clip-llama"), tmp_path / "b")
    before = sorted((path.name, path.stat().st_size) for path in older.iterdir())
    with pytest.raises(CalibrationError) as caught:
        export_with(checkpoint("clip-llama"), folder, older, 1e-6)
    said = str(caught.value)
    for word in ("no layer of vision", "--max-error 1e-06", "vision_tower.", "vision=fp32"):
        assert word in said
    least = float(said.split("least error is ")[1].split(",")[0])
    assert 1e-6 < least < 0.05
    assert sorted((path.name, path.stat().st_size) for path in older.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    # The least error is one: a budget just above it quantizes something.
    report = export_with(checkpoint("clip-llama"), folder, tmp_path / "c", least * 1.2)
    assert "int8" in {row["precision"] for row in report.errors["vision"]["layers"].values()}


def test_a_default_budget_that_nothing_meets_leaves_the_part_in_float(
    checkpoint: Callable[[str], Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(static, "MAX_ERROR", 1e-6)
    report = export_with(checkpoint("clip-llama"), folder, tmp_path / "b", None)
    assert report.precisions["vision"] == "fp32"
    reasons = {row["reason"] for row in report.errors["vision"]["layers"].values()}
    assert reasons == {"budget"}


def test_where_the_graph_errs_more_than_its_switches_said(
    checkpoint: Callable[[str], Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Switches are judged on fewer pictures: the budget holds for the graph on all of them."""
    monkeypatch.setattr(static, "JUDGES", 1)
    kind = mixed.Study.choose
    aims: list[float] = []

    def choose_and_note(study: mixed.Study, budget: float) -> Choice:
        aims.append(budget)
        found = kind(study, budget)
        return Choice(found.quantized, found.error * 0.9, found.least, found.least_paths)

    every = export_with(checkpoint("clip-llama"), folder, tmp_path / "a", None).errors["vision"]
    monkeypatch.setattr(mixed.Study, "choose", choose_and_note)
    for share in (0.9, 0.7, 0.5):
        budget = every["relative_error"] * share
        said = export_with(checkpoint("clip-llama"), folder, tmp_path / "b", budget)
        assert said.errors["vision"]["relative_error"] <= budget
    assert aims == sorted(set(aims), key=aims.index)  # each aim is a new one


@pytest.mark.parametrize("bits", [8, 4])
def test_a_language_model_by_its_divergence(
    bits: int, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same functions with KL divergence of the logits; weights only, timed as a decode step."""
    rows: list[int] = []

    def timed(shape: Shape, *_: Any) -> Times:
        rows.append(shape.rows)
        return Times(1.0, 2.0) if shape.inputs == 70 else Times(2.0, 1.0)

    monkeypatch.setattr(layer_times, "measure", timed)
    case = case_of(checkpoint, "siglip-qwen2", "llm", bits)
    study = mixed.study(
        "llm", case.part.build, case.quantizer, case.feeds, single_output(case.output), case.measure, tmp_path,
        lambda *_: None, rows=1, frugal=False,
    )  # fmt: skip
    assert set(rows) == {1}
    layers = set(study.times)
    slow = {path for path in layers if path.endswith("down_proj")}
    fast = study.choose(1e9)
    assert fast.quantized == layers - slow
    assert fast.error == pytest.approx(real_error(case, fast.quantized, tmp_path), rel=0.05)
    some = study.choose(fast.error / 2)
    assert 0 < some.error <= fast.error / 2
    assert some.quantized < fast.quantized
    report = study.report(some.quantized, f"int{bits}")
    assert list(report) == list(study.times)
    assert mixed.precision_of(report) == f"int{bits}"
    for path, row in report.items():
        reason = "not faster" if path in slow else "budget"
        assert row.get("reason") == (None if path in some.quantized else reason)
    none = study.choose(1e-12)
    assert not none.quantized
    sentence = str(mixed.unmet("llm", "--budget", 1e-12, none))
    assert "no layer of llm" in sentence
    assert none.least_paths[0] in sentence


def test_large_parts_are_measured_in_groups(
    checkpoint: Callable[[str], Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(mixed, "SECONDS", 0.0)
    report = export_with(checkpoint("clip-llama"), folder, tmp_path / "b", 0.03)
    layers = report.errors["vision"]["layers"]
    assert {row["measured_with"] for row in layers.values()} == {2}  # of two blocks
    for path in layers:  # they share the error and the decision
        other = path.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")
        assert layers[path] == layers[other]


# -- what is asked and said -------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -0.1, float("nan")])
def test_budgets_are_above_zero(value: float) -> None:
    with pytest.raises(SettingError, match=r"--max-error is .* above 0"):
        Budgets(max_error=value)
    with pytest.raises(SettingError, match=r"--budget is .* above 0"):
        Budgets(kl=value)


def test_a_budget_of_nothing_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for plan, budgets, said in (
        ("llm=int8", Budgets(max_error=0.1), "neither vision nor connector"),
        ("vision=int8", Budgets(kl=0.1), "language model is not quantized"),
    ):
        with pytest.raises(SettingError, match=said):
            export(
                checkpoint("clip-llama"), tmp_path / "b", precision=PrecisionPlan.parse(plan),
                budgets=budgets,
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


def vlm(*args: str) -> Any:
    return CliRunner().invoke(cli, list(args))


def test_the_command_line_says_why(outlying: Path, folder: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "b")
    args = ["--precision", "vision=int8", "--calibration", str(folder), "--method", "minmax"]
    shown = vlm("export", str(outlying), *args, "-o", output, "--max-error", "0.02")
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(vlm("info", output, "--layers", "--json").stdout)["measured"]["vision"]
    quantized = sum(row["precision"] == "int8" for row in found.values())
    assert f"int8, {quantized} of {len(found)} layers" in shown.stdout
    (row,) = [line for line in shown.stdout.splitlines() if "vision mlp.fc2" in line]
    assert "1: budget" in row or "│ budget" in row
    (every,) = [line for line in shown.stdout.splitlines() if "vision, all" in line]
    error = json.loads((tmp_path / "b" / "manifest.json").read_text())["calibration"]["parts"]
    assert f"together {error['vision']['relative_error']:.2%}" in every
    assert f"{2 * len(found):.2f}" in every  # conftest's milliseconds: 2 in float, 1 in INT8
    assert f"{2 * len(found) - quantized:.2f}" in every
    assert f"{found[OUTLIER]['error']:.2%} in 1" in row
    listed = vlm("info", output, "--layers").stdout
    (line,) = [line for line in listed.splitlines() if "vision 1.mlp.fc2" in line]
    assert "fp32" in line
    assert "budget" in line
    assert "measured" not in json.loads(vlm("info", output, "--json").stdout)
    refused = vlm("export", str(outlying), *args, "-o", output, "--max-error", "1e-7")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1].startswith("error: no layer of vision")
    zero = vlm("export", str(outlying), *args, "-o", output, "--max-error", "0")
    assert zero.exit_code == 2  # an option that makes no sense
    assert "above 0" in zero.stderr


def test_the_help_names_the_default() -> None:
    assert f"default: {MAX_ERROR}," in " ".join(vlm("export", "--help").stdout.split())


def test_info_of_a_bundle_without_measured_layers(bundle: Callable[..., Path]) -> None:
    shown = vlm("info", str(bundle("clip-llama")), "--layers")
    assert shown.exit_code == 0
    assert "No layer was measured" in shown.stdout


def row(reason: str | None = None) -> dict[str, Any]:
    return {"precision": "int8"} if reason is None else {"precision": "fp32", "reason": reason}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"l.0.fc": row(), "l.1.fc": row()}, ""),
        ({"l.0.fc": row("budget"), "l.1.fc": row()}, "0: budget"),
        ({f"l.{i}.fc": row("budget" if i in (0, 1, 2, 7) else None) for i in range(9)},
         "0-2, 7: budget"),
        ({"l.0.fc": row("not faster"), "l.1.fc": row("not faster")}, "not faster"),
        ({"l.0.fc": row("budget"), "l.1.fc": row("not faster")}, "0: budget; 1: not faster"),
        ({"proj.fc": row("budget")}, "budget"),
    ],
)  # fmt: skip
def test_layers_in_float_by_reason(layers: dict[str, Any], said: str) -> None:
    assert tables.kept(layers) == said


def test_places() -> None:
    assert tables.place("vision_tower.encoder.layers.12.mlp.fc1") == ("12", "mlp.fc1")
    assert tables.place("multi_modal_projector.linear_1") == ("", "linear_1")
    assert tables.place("head") == ("", "head")
