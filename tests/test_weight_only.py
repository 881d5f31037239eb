"""A language model calibrated layer by layer: equal to the whole model's calibration, measured, mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.calibration import gptq
from vlm_edge.calibration.data import CalibrationSet, Prompt
from vlm_edge.calibration.divergence import divergence
from vlm_edge.errors import CalibrationError
from vlm_edge.export import (
    examples,
    graphs,
    language_study,
    weight_only_int4,
    weight_only_int8,
)
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.examples import Example, Examples
from vlm_edge.export.layerwise import States, inputs_by_layer, runner
from vlm_edge.export.model import Part
from vlm_edge.export.pipeline import read_model
from vlm_edge.export.quantizers import Float, Observer
from vlm_edge.export.quantizers.rounding import block_size
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import DecoderSettings
from vlm_edge.runtime.ort import open_session

LENGTHS = (5, 31, 1, 18, 12, 7, 23, 9)
DATA = CalibrationSet((), (), tuple(Prompt((), str(n)) for n in LENGTHS), "")
# GQA and a window; tied, biases of q, k, v and a window in one layer of two; all biases; yarn
CASES = ["clip-mistral-window", "siglip-qwen2", "clip-llama-biases", "siglip-llama-yarn-v4"]


@dataclass(frozen=True)
class Subject:
    """A tiny checkpoint's language model and prompts of random embeddings."""

    part: Part
    settings: DecoderSettings
    embeds: list[np.ndarray]

    def examples(self, held_out: Sequence[int] = ()) -> Examples:
        return Examples.split(self.settings, [Example(embed) for embed in self.embeds], held_out)


@pytest.fixture(scope="module")
def subject(checkpoint: Callable[[str], Path]) -> Callable[[str], Subject]:
    def make(case: str) -> Subject:
        _, model, _ = read_model(checkpoint(case))
        generator = np.random.default_rng(len(case))
        shapes = [(1, length, model.decoder.width) for length in LENGTHS]
        embeds = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
        return Subject(model.parts["llm"], model.decoder, embeds)

    return make


def quiet(*_: Any) -> None:
    """No progress."""


def run_whole(subject: Subject, model: ir.Model, path: Path, embed: np.ndarray) -> dict[str, Any]:
    """All outputs of a whole decoder graph, for every position."""
    graphs.save(model, path)
    session = open_session(path, "llm", 1)
    feeds = prefill_feeds(subject.settings, embed)
    feeds["logit_positions"] = np.arange(embed.shape[1])
    names = [output.name for output in session.get_outputs()]
    fed = {spec.name: feeds[spec.name] for spec in session.get_inputs()}
    return dict(zip(names, session.run(names, fed), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_layers_in_turn_are_the_whole_model(
    case: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    it = subject(case)
    states = States(it.examples(), tmp_path / "states.npy")
    for _ in inputs_by_layer("llm", it.part, it.examples(), states, False, tmp_path, quiet):
        pass
    head = runner(it.part.layers.build_head(Float()), tmp_path / "head.onnx")
    for index, embed in enumerate(it.embeds):
        feeds = Example(embed).feeds(it.settings, states[index])
        found = head({**feeds, "logit_positions": np.arange(embed.shape[1])})["logits"]
        expected = run_whole(it, it.part.build(Float()), tmp_path / "whole.onnx", embed)["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def gram(op: Any, x: ir.Value) -> dict[str, ir.Value]:
    """The sum of x x^T, as the graph itself can give it."""
    width = op.Slice(op.Shape(x), [-1], [1 << 31], [0])
    flat = op.Reshape(x, op.Concat([-1], width, axis=0))
    return {"gram.": op.MatMul(op.Transpose(flat, perm=[1, 0]), flat)}


@pytest.mark.parametrize("case", CASES)
def test_gptq_layer_by_layer_rounds_as_over_the_whole_model(
    case: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    """The sums that GPTQ works on, against those that the whole graph gives, prompt by prompt; and what
    it makes of both."""
    it = subject(case)
    held_out = (3, 7)
    observer = Observer(gram)
    model = it.part.build(observer)
    observer.add_outputs(model)
    sums: dict[str, Any] = {}
    peaks: dict[str, Any] = {}
    for index, embed in enumerate(it.embeds):
        if index not in held_out:
            for name, value in run_whole(it, model, tmp_path / "whole.onnx", embed).items():
                if name.startswith("gram."):
                    sums[name[5:]] = sums.get(name[5:], 0) + value
    split = it.examples(held_out)
    states = States(split, tmp_path / "states.npy")
    seen: set[str] = set()
    layers = inputs_by_layer("llm", it.part, split, states, True, tmp_path, quiet)
    for inputs in layers:
        for first, found in inputs.items():
            expected = sums[first]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found.gram, expected, rtol=1e-4, atol=1e-5 * scale)
            assert {observer.readers[path] for path in found.weights} == {first}
            seen |= found.weights.keys()
            assert np.all(found.peaks**2 <= np.diag(expected) * 1.001)
            peaks[first] = found.peaks
            for weight in found.weights.values():
                rounded = [
                    rounded_by(weight, np.ascontiguousarray(h)) for h in (found.gram, expected)
                ]
                same = rounded[0][0] == rounded[1][0]
                assert same.mean() > 0.999  # sums in another order differ in the last bits
    assert seen | it.part.keep8 == set(observer.weights)
    assert all(peak.max() > 0 for peak in peaks.values())


def rounded_by(weight: TensorRef, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    block = block_size(len(hessian), 32)
    return gptq.quantize(
        np.ascontiguousarray(weight.numpy().T), gptq.factor(hessian), block,
        lambda rows, costs: gptq.weighted_scales(rows, costs, -8, 7), -8, 7,
    )  # fmt: skip


def test_only_inputs_behind_norms_and_gates_are_scaled(
    subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    for case, gated in (("clip-mistral-window", True), ("clip-llama-biases", False)):
        it = subject(case)
        states = States(it.examples(), tmp_path / "states.npy")
        for inputs in inputs_by_layer(
            "llm", it.part, it.examples(), states, False, tmp_path, quiet
        ):
            found = {first.split(".")[-1]: kept.smoothable for first, kept in inputs.items()}
            # A bias behind up_proj would have to be scaled as well: it is left alone.
            assert found == {"q_proj": True, "o_proj": False, "gate_proj": True, "down_proj": gated}


def test_what_is_not_finite_is_named(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    it = subject("clip-mistral-window")
    bad = [it.embeds[0].copy()]
    bad[0][0, 2, 3] = np.nan
    damaged = Subject(it.part, it.settings, bad).examples()
    states = States(damaged, tmp_path / "states.npy")
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj is not finite"):
        list(inputs_by_layer("llm", it.part, damaged, states, True, tmp_path, quiet))


# -- the graphs that are written --------------------------------------------------------------


def written(
    kind: str, it: Subject, folder: Path, data: CalibrationSet = DATA, **options: Any
) -> dict[str, Any]:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    write = {"int4": weight_only_int4.write_int4, "int8": weight_only_int8.write_int8}[kind]
    split = it.examples(data.held_out_prompts)
    return write("llm", it.part, split, folder, folder / "scratch", quiet, **options)


def logits(path: Path, it: Subject, embed: np.ndarray) -> np.ndarray:
    session = open_session(path, "llm", 1)
    feeds = prefill_feeds(it.settings, embed)
    feeds["logit_positions"] = np.arange(embed.shape[1])
    fed = {spec.name: feeds[spec.name] for spec in session.get_inputs()}
    return session.run(["logits"], fed)[0][0].astype(np.float64)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_figures_are_those_of_the_held_out_prompts(
    kind: str, subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "LAST", 20)
    it = subject("siglip-qwen2")
    said = written(kind, it, tmp_path)
    graphs.save(it.part.build(Float()), tmp_path / "exact.onnx")
    divergences, same = [], []
    for index in DATA.held_out_prompts:
        p, q = (
            np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True))
            for x in (
                logits(tmp_path / name, it, it.embeds[index])[-20:]
                for name in ("exact.onnx", "llm.onnx")
            )
        )
        divergences.append((p * np.log(p / q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    assert said["kl"] == pytest.approx(np.concatenate(divergences).mean(), rel=0.02)
    assert said["top1_agreement"] == pytest.approx(np.concatenate(same).mean())
    best = said["tried"][-1] if kind == "int4" else said["tried"][said["method"]]
    assert best["kl"] == said["kl"]
    if kind == "int8":
        assert said["kl"] == min(tried["kl"] for tried in said["tried"].values())


def precisions(path: Path) -> dict[str, ir.DataType]:
    """Dtype of every linear layer's weight, by path."""
    found = {}
    for node in ir.load(path).graph:
        maker = node.inputs[1].producer() if node.op_type == "MatMul" else None
        if maker is not None:
            found[maker.inputs[0].name.removesuffix(".weight")] = maker.inputs[0].dtype
        elif node.op_type == "MatMul":
            found[node.inputs[1].name.removesuffix(".weight")] = node.inputs[1].dtype
    return {path: dtype for path, dtype in found.items() if "_proj" in path}


def test_int8_comes_in_layer_by_layer_as_the_budget_asks(
    subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = subject("clip-mistral-window")
    counts = []
    for budget in (1e9, 0.5, 0.0):
        if budget == 0.5:  # half of what INT4 throughout costs
            budget *= said["kl"]  # noqa: F821  # of the round before
        monkeypatch.setattr(weight_only_int4, "BUDGET", budget)
        folder = tmp_path / str(budget)
        said = written("int4", it, folder)
        assert said["tried"][0]["int8_layers"] == len(it.part.keep8)
        assert len(said["tried"]) <= 1 + language_study.TRIES
        assert said["kl"] == said["tried"][-1]["kl"]
        stored = precisions(folder / "llm.onnx")
        counts.append(sum(dtype == ir.DataType.INT8 for dtype in stored.values()))
        assert set(stored.values()) <= {ir.DataType.INT4, ir.DataType.INT8}
        if budget:
            assert said["kl"] <= budget
        if said["layers"]:
            report = [row["precision"] for path, row in said["layers"].items() if "_proj" in path]
            assert report.count("int8") == counts[-1]
    assert 0 == counts[0] < counts[1] < counts[2] == len(stored)


def test_a_large_model_mixes_by_kind(
    subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_study, "LARGEST", 0)
    monkeypatch.setattr(weight_only_int4, "BUDGET", 0.0)
    said = written("int4", subject("clip-mistral-window"), tmp_path)
    assert len(said["tried"]) == 1 + len(weight_only_int4.STEPS)
    assert said["layers"] == {}
    for path, dtype in precisions(tmp_path / "llm.onnx").items():
        eight = path.endswith(weight_only_int4.STEPS[-1])
        assert dtype == (ir.DataType.INT8 if eight else ir.DataType.INT4), path


def test_under_int8_layers_without_room_stay_in_float(
    subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = subject("siglip-qwen2")
    whole = written("int8", it, tmp_path / "whole")
    assert {row["precision"] for row in whole["layers"].values()} == {"int8"}
    monkeypatch.setattr(weight_only_int8, "BUDGET", whole["kl"] / 2)
    said = written("int8", it, tmp_path / "half")
    kept = [path for path, row in said["layers"].items() if row["precision"] == "fp32"]
    assert 0 < len(kept) < len(said["layers"])
    assert all(said["layers"][path]["reason"] == "budget" for path in kept)
    assert said["kl"] <= whole["kl"] / 2
    stored = precisions(tmp_path / "half" / "llm.onnx")
    floats = sum(dtype == ir.DataType.FLOAT for dtype in stored.values())
    assert floats == sum("_proj" in path for path in kept)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_budget_that_nothing_meets_is_named(
    kind: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    with pytest.raises(
        CalibrationError, match=r"--budget 1e-15.*least KL divergence.*raise --budget"
    ):
        written(kind, subject("clip-mistral-window"), tmp_path, budget=1e-15)


def test_gptq_beats_rounding_to_nearest(
    subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On prompts it has not seen, when they are as related as those it has."""
    monkeypatch.setattr(weight_only_int4, "BUDGET", 1e9)  # INT4 throughout
    it = subject("siglip-llama-yarn-v4")
    generator = np.random.default_rng(3)
    mixing = generator.standard_normal((12, it.settings.width))
    embeds = [
        (generator.standard_normal((1, 60, 12)) @ mixing).astype(np.float32) for _ in range(24)
    ]
    it = Subject(it.part, it.settings, embeds)
    data = CalibrationSet((), (), tuple(Prompt((), str(n)) for n in range(24)), "")
    said = written("int4", it, tmp_path, data)
    block, block8 = weight_only_int4.BLOCK, weight_only_int4.BLOCK8
    nearest = WeightOnly(4, block, it.part.keep8, block8=block8)
    graphs.save(it.part.build(nearest), tmp_path / "nearest.onnx")
    graphs.save(it.part.build(Float()), tmp_path / "exact.onnx")
    last = slice(-examples.LAST, None)
    exact, found = (
        [logits(tmp_path / f"{name}.onnx", it, embeds[i])[last] for i in data.held_out_prompts]
        for name in ("exact", "nearest")
    )
    assert said["kl"] < 0.8 * divergence(zip(found, exact, strict=True)).kl


@pytest.mark.parametrize("write", [weight_only_int8.write_int8, weight_only_int4.write_int4])
def test_weights_for_tensorrt_have_a_scale_a_column(
    write: Callable[..., dict[str, Any]], subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    """Those in INT8, which under INT4 are the head's and what the budget asks for."""
    it, scratch = subject("clip-mistral-window"), tmp_path / "scratch"
    scratch.mkdir()
    said = write(
        "llm", it.part, it.examples((3, 7)), tmp_path, scratch, quiet, timed=False, columns=True
    )
    assert not any("ms_float" in layer for layer in said["layers"].values())
    graph = ir.load(tmp_path / "llm.onnx").graph
    found = [
        [value.const_value.numpy() for value in node.inputs[:2]]
        for node in graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].dtype == ir.DataType.INT8
    ]
    assert len(found) == sum(row["precision"] == "int8" for row in said["layers"].values()) > 0
    for values, scales in found:
        assert scales.shape == (1, values.shape[1])
        assert (np.abs(values).max(axis=0) == 127).all()
