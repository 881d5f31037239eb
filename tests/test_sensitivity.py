"""Each layer's own error: by switches in one graph, the same as graphs with that layer quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_edge.calibration.sensitivity import (
    KL,
    RELATIVE,
    Measure,
    Switchboard,
    kind,
    measure_layers,
    single_output,
)
from vlm_edge.errors import CalibrationError
from vlm_edge.export import graphs, switched
from vlm_edge.export.layer_times import Shape, Times
from vlm_edge.export.layer_times import measure as measure_times  # before conftest replaces it
from vlm_edge.export.model import Part
from vlm_edge.export.pipeline import read_model
from vlm_edge.export.quantizers import Float, Observer, Quantizer
from vlm_edge.export.quantizers.static_int8 import StaticInt8
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.ort import open_session


def observe(part: Part) -> Observer:
    observer = Observer(lambda op, x: {})
    part.build(observer)
    return observer


def static_int8(part: Part) -> StaticInt8:
    """Ranges that clip a little, and smoothing that layers with one input share."""
    layers = observe(part)
    generator = np.random.default_rng(0)
    shared: dict[str, np.ndarray] = {}
    for path, first in layers.readers.items():
        width = layers.weights[path].shape[1]
        if first not in shared:
            shared[first] = np.exp(generator.normal(0, 0.5, width)).astype(np.float32)
    smoothing = {path: shared[first] for path, first in layers.readers.items()}
    return StaticInt8(dict.fromkeys(layers.weights, 5.0), smoothing)


class Only:
    """`quantizer` for the layers `paths`, full precision for the others."""

    def __init__(self, quantizer: Quantizer, paths: Collection[str]) -> None:
        self.quantizer, self.paths = quantizer, paths

    def product(self, path: str, weight: Any) -> Any:
        return (self.quantizer if path in self.paths else Float()).product(path, weight)


@dataclass(frozen=True)
class Case:
    part: Part
    feeds: list[dict[str, np.ndarray]]
    output: str
    quantizer: Callable[[], Quantizer]
    measure: Measure


def case_of(checkpoint: Callable[[str], Path], name: str, part: str, bits: int = 8) -> Case:
    """Two samples of odd sizes through a part of a tiny checkpoint."""
    _, model, _ = read_model(checkpoint(name))
    found = model.parts[part]
    generator = np.random.default_rng(1)
    if part == "llm":
        lengths = (5, 9)
        embeds = [generator.normal(0, 0.5, (1, n, model.decoder.width)) for n in lengths]
        inputs = {spec.name for spec in found.interface.inputs}
        feeds = [prefill_feeds(model.decoder, each.astype(np.float32)) for each in embeds]
        feeds = [{key: value for key, value in f.items() if key in inputs} for f in feeds]
        for feed, length in zip(feeds, lengths, strict=True):
            feed["logit_positions"] = np.arange(length)
        return Case(found, feeds, "logits", lambda: WeightOnly(bits, 32), KL)
    (source,), (target,) = found.interface.inputs, found.interface.outputs
    shape = [1 if isinstance(size, str) else size for size in source.shape]
    feeds = [{source.name: generator.standard_normal(shape, np.float32)} for _ in range(2)]
    return Case(found, feeds, target.name, lambda: static_int8(found), RELATIVE)


def switchboard(case: Case, path: Path) -> Switchboard:
    layers = switched.write(case.part.build, case.quantizer(), path).weights
    session = open_session(path, "part", 1)
    return Switchboard(session, layers, case.feeds, single_output(case.output), case.measure)


def real_error(case: Case, paths: Collection[str], folder: Path) -> float:
    """Of a graph in which the layers `paths` are quantized and no switch is."""
    outputs = []
    for name, quantizer in (("found", Only(case.quantizer(), paths)), ("exact", Float())):
        path = folder / f"{name}.onnx"
        graphs.save(case.part.build(quantizer), path)
        session = open_session(path, "part", 1)
        outputs.append([session.run([case.output], feed)[0] for feed in case.feeds])
    return case.measure.of(zip(*outputs, strict=True))


CASES = [
    ("clip-llama", "vision", 8),
    ("dinov2-swiglu", "vision", 8),
    ("siglip-qwen2", "connector", 8),
    ("siglip-qwen2", "llm", 4),
    ("clip-llama-native", "llm", 8),
    ("clip-mistral-window", "llm", 4),
]


@pytest.mark.parametrize(("name", "part", "bits"), CASES)
def test_switches_give_the_error_of_graphs_with_these_layers(
    name: str, part: str, bits: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """None, each of a few alone, some, all; smoothed inputs, biases, fused and tied weights alike."""
    case = case_of(checkpoint, name, part, bits)
    board = switchboard(case, tmp_path / "switched.onnx")
    layers = list(board.shapes)
    assert layers == list(observe(case.part).weights)
    assert board.error([]) == 0
    chosen = [[layers[0]], [layers[-1]], [layers[len(layers) // 2]], layers[1::2], layers]
    for paths in chosen:
        found, expected = board.error(paths), real_error(case, paths, tmp_path)
        assert expected > 0
        # The last bit of float32 may move a value over the edge of a rounding step.
        assert found == pytest.approx(expected, rel=0.05)
    assert board.seconds > 0


@pytest.mark.parametrize(("name", "part", "bits"), CASES)
def test_errors_of_single_layers_add_up(
    name: str, part: str, bits: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Squares of relative errors, and KL divergences: the sum is a fair guess of the whole. (On the
    demo model's vision encoder: 4.05 % against 4.16 %.) Random weights, a few wide steps: within
    two."""
    case = case_of(checkpoint, name, part, bits)
    board = switchboard(case, tmp_path / "switched.onnx")
    power = case.measure.power
    single = sum(board.error([path]) ** power for path in board.shapes) ** (1 / power)
    assert 0.5 < single / board.error(board.shapes) < 2


def test_shapes_and_biases_are_those_of_the_layers(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    case = case_of(checkpoint, "clip-llama-biases", "vision")
    written = switched.write(case.part.build, case.quantizer(), tmp_path / "a.onnx")
    session = open_session(tmp_path / "a.onnx", "part", 1)
    board = Switchboard(session, written.weights, case.feeds, single_output(case.output), RELATIVE)
    for path, weight in written.weights.items():
        assert board.shapes[path] == (1, 10, weight.shape[1])  # 3 x 3 patches and the class token
        assert written.has_bias(path)
    case = case_of(checkpoint, "siglip-qwen2", "llm")
    written = switched.write(case.part.build, case.quantizer(), tmp_path / "b.onnx")
    biased = {path.rpartition(".")[2] for path in written.weights if written.has_bias(path)}
    assert biased == {"q_proj", "k_proj", "v_proj"}


def test_fewer_samples_can_be_asked_for(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    case = case_of(checkpoint, "clip-llama", "vision")
    board = switchboard(case, tmp_path / "switched.onnx")
    one = Case(case.part, case.feeds[:1], case.output, case.quantizer, RELATIVE)
    assert board.error(board.shapes, 1) == pytest.approx(
        real_error(one, list(board.shapes), tmp_path), rel=0.05
    )
    assert board.error(board.shapes, 1) != board.error(board.shapes)
    assert board.samples == 2


def test_an_output_that_is_not_finite_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    case = case_of(checkpoint, "siglip-qwen2", "connector")
    case.feeds[1]["features"][0, 0, 0] = np.inf
    with pytest.raises(CalibrationError, match="image_features is not finite"):
        switchboard(case, tmp_path / "switched.onnx")


# -- how measurements are spent ---------------------------------------------------------------


def test_kinds() -> None:
    assert kind("vision_tower.encoder.layers.12.mlp.fc1") == "mlp.fc1"
    assert kind("stages.0.blocks.3.fc") == "fc"
    assert kind("multi_modal_projector.linear_1") == "multi_modal_projector.linear_1"


def counted(bad: Mapping[str, float]) -> tuple[Callable[[Collection[str]], float], list[int]]:
    """An error whose squares add up, each layer 1 but the bad ones; and the number of calls."""
    calls: list[int] = []

    def error(paths: Collection[str]) -> float:
        calls.append(len(paths))
        return sum(bad.get(path, 1.0) ** 2 for path in paths) ** 0.5

    return error, calls


GROUPS = [[f"{k}{i}" for i in range(24)] for k in "abcdef"]
EVERY = [path for group in GROUPS for path in group]


def test_layers_are_measured_alone_where_there_is_time() -> None:
    error, calls = counted({"b3": 9.0})
    ticks: list[tuple[int, int]] = []
    units = measure_layers(GROUPS, error, len(EVERY), lambda *at: ticks.append(at))
    assert [unit.paths for unit in units] == [(path,) for path in EVERY]
    assert {unit.error for unit in units} == {1.0, 9.0}
    assert calls == [1] * len(EVERY)
    assert ticks[0] == (1, len(EVERY))
    assert ticks[-1] == (len(EVERY), len(EVERY))


@pytest.mark.parametrize("most", [0, 6, 7, 20, 30, 143])
def test_groups_are_halved_where_the_error_is(most: int) -> None:
    error, calls = counted({"b3": 30.0, "e20": 20.0})
    units = measure_layers(GROUPS, error, most)
    assert sorted(path for unit in units for path in unit.paths) == sorted(EVERY)
    for unit in units:  # neighbours of one kind, in order
        numbers = [int(path[1:]) for path in unit.paths]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert len({path[0] for path in unit.paths}) == 1
        assert unit.error == pytest.approx(error(unit.paths))
    spent = len(calls) - len(units)
    assert spent <= max(most, len(GROUPS))
    assert most - spent <= 1 or most < len(GROUPS)
    if most >= 30:  # six groups, and twice the halvings of 24
        alone = {unit.paths for unit in units if len(unit.paths) == 1}
        assert {("b3",), ("e20",)} <= alone


# -- times ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(7, 45, 31, True), Shape(1, 64, 40, False)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_layer_is_timed_in_both_forms(shape: Shape, bits: int | None, tmp_path: Path) -> None:
    quantizer: Quantizer = StaticInt8({"l": 3.0}) if bits is None else WeightOnly(bits, 32)
    found = measure_times(shape, "l", quantizer, tmp_path)
    assert 0 < found.exact < 1000
    assert 0 < found.quantized < 1000
    assert (tmp_path / "quantized.cpu.onnx").is_file() == (bits is None)  # as it will run


def test_a_gain_within_the_noise_is_none() -> None:
    assert Times(2.0, 1.0).faster
    assert not Times(1.0, 1.0).faster
    assert not Times(1.04, 1.0).faster
    assert not Times(1.0, 2.0).faster
    assert Times(2.0, 1.25).saved == 0.75
