"""T5's two parts in INT8 and INT4: calibrated on prompts and on the model's own answers, judged, mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Cache
from tiny_t5 import CASES, build, parts, prompt

from vlm_edge.calibration.divergence import divergence
from vlm_edge.errors import CalibrationError
from vlm_edge.export import (
    answers,
    graphs,
    language_study,
    lowering,
    w8a8,
    weight_only_int4,
    weight_only_int8,
)
from vlm_edge.export.answers import LONGEST, answered
from vlm_edge.export.checkpoint import Checkpoint, TensorRef
from vlm_edge.export.examples import Example, Examples
from vlm_edge.export.language import t5
from vlm_edge.export.layerwise import Run, States, inputs_by_layer, runner, session_runner
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Float, Observer
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.runtime import native
from vlm_edge.runtime.feeds import windows

LENGTHS = (5, 31, 1, 18, 12, 7, 23, 9, 40, 3, 15, 11)
HELD_OUT = (3, 7, 11)
PARTS = ("llm_encoder", "llm")
WRITE: dict[str, Callable[..., dict[str, Any]]] = {
    "int8": weight_only_int8.write_int8,
    "int4": weight_only_int4.write_int4,
}


@dataclass(frozen=True)
class Subject:
    """A tiny T5 and what its parts are calibrated on."""

    config: t5.T5Config
    parts: dict[str, Part]
    prompts: list[np.ndarray]
    table: TensorRef
    examples: dict[str, Examples]
    floats: dict[str, Run]

    def answer(self, cross: dict[str, np.ndarray], embeds: np.ndarray, run: Run) -> np.ndarray:
        """A decoder's logits [n, vocab] of an answer that is given."""
        example = answers.Example(embeds, lambda: cross)
        found = run(example.feeds(self.config.settings()))["logits"][0]
        assert len(found) == embeds.shape[1]
        return found


def quiet(*_: Any) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    def make(case: str) -> Subject:
        folder = build(CASES[case], tmp_path_factory.mktemp(case) / "checkpoint")
        config, found = parts(folder)
        prompts = [prompt(config, length, seed) for seed, length in enumerate(LENGTHS)]
        table = Checkpoint(folder).tensor("shared.weight", (config.vocab_size, config.width))
        scratch = folder.parent
        asked = Examples.split(config.settings(), [*map(Example, prompts)], HELD_OUT)
        examples = answered(found, asked, table, {1}, scratch, quiet)
        floats = {
            name: runner(part.build(Float()), scratch / f"{name}.exact.onnx")
            for name, part in found.items()
        }
        return Subject(config, found, prompts, table, examples, floats)

    return Cache(make)


def order(every: Sequence[Any]) -> list[Any]:
    """As `Examples` has them."""
    used = [each for index, each in enumerate(every) if index not in HELD_OUT]
    return used + [every[index] for index in HELD_OUT]


@pytest.mark.parametrize("case", CASES)
def test_the_decoder_is_calibrated_on_the_models_own_answers(
    case: str, subject: Callable[[str], Subject]
) -> None:
    it = subject(case)
    table, lengths = it.table.numpy(), set()
    for embeds, example in zip(order(it.prompts), it.examples["llm"], strict=True):
        cross = it.floats["llm_encoder"]({"inputs_embeds": embeds})
        kept = example.constants()
        assert kept.keys() == cross.keys()
        for name, array in kept.items():
            np.testing.assert_allclose(array, cross[name], rtol=0, atol=1e-5)
        tokens = [int((table == row).all(axis=1).argmax()) for row in example.embeds[0]]
        assert tokens[0] == it.config.start_token_id
        best = it.answer(cross, example.embeds, it.floats["llm"]).argmax(axis=1).tolist()
        assert best[:-1] == tokens[1:] and 1 not in tokens[1:]
        assert len(tokens) == LONGEST or best[-1] == 1
        lengths.add(len(tokens))
    assert max(lengths) > 2


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_the_layers_in_turn_are_the_whole_part(
    case: str, name: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    """Their outputs, and every linear layer's input: behind the layers too, where the encoder has the
    decoder's keys and values."""
    it = subject(case)
    part, examples, settings = it.parts[name], it.examples[name], it.config.settings()
    assert part.layers is not None
    states = States(examples, tmp_path / "states.npy")
    observer = Observer(lambda op, x: {"seen.": op.Identity(x)})
    model = part.build(observer)
    observer.add_outputs(model)
    whole = runner(model, tmp_path / "whole.onnx")
    outputs = [whole(example.feeds(settings)) for example in examples]
    peaks: dict[str, np.ndarray] = {}
    grams: dict[str, np.ndarray] = {}
    for inputs in inputs_by_layer(name, part, examples, states, True, tmp_path, quiet):
        for kept in inputs.values():
            for path in kept.weights:
                peaks[path], grams[path] = kept.peaks, kept.gram
    assert peaks.keys() | part.keep8 == observer.weights.keys()
    assert not peaks.keys() & part.keep8
    for path, peak in peaks.items():
        key = "seen." + observer.readers[path]
        rows = np.concatenate([found[key][0] for found in outputs[: len(examples.used)]])
        np.testing.assert_allclose(peak, np.abs(rows).max(axis=0), rtol=1e-4, atol=1e-5)
        gram = rows.T @ rows
        np.testing.assert_allclose(grams[path], gram, rtol=1e-3, atol=1e-4 * np.abs(gram).max())
    head = runner(part.layers.build_head(Float()), tmp_path / "head.onnx")
    for index, (example, expected) in enumerate(zip(examples, outputs, strict=True)):
        found = head(example.feeds(settings, states[index]))
        assert found.keys() == {key for key in expected if not key.startswith("seen.")}
        for key, array in found.items():
            np.testing.assert_allclose(array, expected[key], rtol=1e-4, atol=1e-4)


def test_inputs_behind_norms_and_gates_are_scaled(
    subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    for case, gated in (("flan", True), ("plain", False)):
        it = subject(case)
        smoothable: dict[str, bool] = {}
        for name in PARTS:
            states = States(it.examples[name], tmp_path / "states.npy")
            for inputs in inputs_by_layer(
                name, it.parts[name], it.examples[name], states, False, tmp_path, quiet
            ):
                for first, kept in inputs.items():
                    smoothable[".".join(first.split(".")[-2:])] = kept.smoothable
        assert smoothable == {
            "SelfAttention.q": True, "SelfAttention.o": False, "EncDecAttention.k": True,
            "EncDecAttention.q": True, "EncDecAttention.o": False,
            f"DenseReluDense.wi{'_0' if gated else ''}": True, "DenseReluDense.wo": gated,
        }  # fmt: skip


# -- the graphs that are written --------------------------------------------------------------


def written(kind: str, name: str, it: Subject, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    return WRITE[kind](
        name, it.parts[name], it.examples[name], folder, folder / "scratch", quiet, **options
    )


def real(it: Subject, name: str, graph: Path, held_out: Sequence[int] = HELD_OUT) -> Any:
    """How far the model is from full precision with this part of it as `graph` has it."""
    run = session_runner(graph, frugal=False)
    pairs = []
    for index, embeds in zip(held_out, it.examples["llm"].held_out, strict=True):
        exact = it.floats["llm_encoder"]({"inputs_embeds": it.prompts[index]})
        cross = run({"inputs_embeds": it.prompts[index]}) if name == "llm_encoder" else exact
        decode = run if name == "llm" else it.floats["llm"]
        expected = it.answer(exact, embeds.embeds, it.floats["llm"])
        pairs.append((it.answer(cross, embeds.embeds, decode), expected))
    return divergence(pairs)


# Measured: INT8 0.00005 to 0.009, INT4 0.003 to 0.81 (random weights have nothing redundant to lose, and
# logits here are of order 10).
MOST = {"int8": 0.012, "int4": 1.0}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_quantized_parts_say_nearly_the_same(
    case: str, name: str, kind: str, subject: Callable[[str], Subject], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(weight_only_int4, "BUDGET", 1e9)
    monkeypatch.setattr(weight_only_int8, "BUDGET", 1e9)
    it = subject(case)
    said = written(kind, name, it, tmp_path)
    found = real(it, name, tmp_path / f"{name}.onnx")
    assert said["kl"] == pytest.approx(found.kl, rel=0.02)
    assert said["top1_agreement"] == pytest.approx(found.top1_agreement)
    assert 1e-6 < said["kl"] < MOST[kind]
    onnx.checker.check_model(str(tmp_path / f"{name}.onnx"), full_check=True)
    graph = ir.load(tmp_path / f"{name}.onnx").graph
    assert not any(
        node.op_type == "Mul" and (node.inputs[1].name or "").endswith(".smooth") for node in graph
    )
    stored = precisions(graph)
    paths = language_study.linear_layers(it.parts[name])
    assert len(stored) == len(paths)
    eight = len(it.parts[name].keep8) if kind == "int4" else len(paths)
    assert list(stored.values()).count(ir.DataType.INT8) == eight
    if kind == "int8":
        assert said["layers"].keys() == paths
        assert {row["precision"] for row in said["layers"].values()} == {"int8"}
    else:
        assert said["scaled_layers"] > 0


def precisions(graph: ir.Graph) -> dict[str, ir.DataType]:
    """Dtype of every linear layer's weight, by its name in the graph."""
    found = {}
    for node in graph:
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            maker = weight.producer()
            weight = weight if maker is None else maker.inputs[0]
            found[weight.name] = weight.dtype
    return found


@pytest.mark.parametrize("name", PARTS)
def test_layers_without_room_stay_in_float_or_go_to_int8(
    name: str, subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = subject("flan")
    paths = language_study.linear_layers(it.parts[name])
    for kind, module, rest in (
        ("int8", weight_only_int8, ir.DataType.FLOAT),
        ("int4", weight_only_int4, ir.DataType.INT8),
    ):
        monkeypatch.setattr(module, "BUDGET", 1e9)
        whole = written(kind, name, it, tmp_path / f"{kind}-whole")
        monkeypatch.setattr(module, "BUDGET", whole["kl"] / 2)
        said = written(kind, name, it, tmp_path / f"{kind}-half")
        assert said["kl"] <= whole["kl"] / 2
        assert said["layers"].keys() == paths  # every one, by its path
        label = {"int8": "fp32", "int4": "int8"}[kind]
        kept = {path for path, row in said["layers"].items() if row["precision"] == label}
        assert 0 < len(kept) < len(paths)
        reasons = {said["layers"][path]["reason"] for path in kept - it.parts[name].keep8}
        assert reasons == {"budget"}
        stored = precisions(ir.load(tmp_path / f"{kind}-half" / f"{name}.onnx").graph)
        assert list(stored.values()).count(rest) == len(kept)
        found = real(it, name, tmp_path / f"{kind}-half" / f"{name}.onnx")
        assert found.kl == pytest.approx(said["kl"], rel=0.02)


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("name", PARTS)
def test_a_budget_that_nothing_meets_is_named(
    name: str, kind: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    sentence = rf"{name} cannot be quantized within --budget 1e-15.*--precision {name}="
    with pytest.raises(CalibrationError, match=sentence):
        written(kind, name, subject("flan"), tmp_path, budget=1e-15)


def test_a_large_part_mixes_by_kind(
    subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_study, "LARGEST", 0)
    monkeypatch.setattr(weight_only_int4, "BUDGET", 0.0)
    for name in PARTS:
        said = written("int4", name, subject("flan"), tmp_path)
        assert len(said["tried"]) == 1 + len(weight_only_int4.STEPS)
        assert said["layers"] == {}
        stored = precisions(ir.load(tmp_path / f"{name}.onnx").graph)
        for path, dtype in stored.items():
            four = ".wi" in path  # what is in no step
            assert dtype == (ir.DataType.INT4 if four else ir.DataType.INT8), path


def test_an_encoder_that_is_not_finite_is_named(
    subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    it = subject("flan")
    examples = it.examples["llm_encoder"]
    bad = examples.used[0].embeds.copy()
    bad[0, 0, 3] = np.nan
    damaged = Examples(examples.settings, [answers.Example(bad)], [])
    states = States(damaged, tmp_path / "states.npy")
    with pytest.raises(CalibrationError, match=r"block\.0\.layer\.0.*is not finite"):
        list(
            inputs_by_layer(
                "llm_encoder", it.parts["llm_encoder"], damaged, states, True, tmp_path, quiet
            )
        )


def test_gptq_beats_rounding_to_nearest(
    subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On prompts it has not seen, when they are as related as those it has."""
    monkeypatch.setattr(weight_only_int4, "BUDGET", 1e9)  # INT4 throughout
    it = subject("scaled-own")
    generator = np.random.default_rng(3)
    mixing = generator.standard_normal((12, it.config.width))
    prompts = [
        (generator.standard_normal((1, 40, 12)) @ mixing).astype(np.float32) for _ in range(24)
    ]
    asked = Examples.split(it.config.settings(), [*map(Example, prompts)], range(3, 24, 4))
    examples = answered(it.parts, asked, it.table, {1}, tmp_path, quiet)
    it = replace(it, prompts=prompts, examples=examples)
    for name, part in it.parts.items():
        said = written("int4", name, it, tmp_path)
        nearest = WeightOnly(4, weight_only_int4.BLOCK, part.keep8, block8=weight_only_int4.BLOCK8)
        graphs.save(part.build(nearest), tmp_path / "nearest.onnx")
        found = real(it, name, tmp_path / "nearest.onnx", range(3, 24, 4))
        assert said["kl"] < 0.8 * found.kl


@pytest.mark.parametrize("kind", ["fp32", *WRITE])
@pytest.mark.parametrize("case", ["flan", "plain"])
def test_lowered_graphs_say_nearly_the_same(
    case: str,
    kind: str,
    subject: Callable[[str], Subject],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our kernels round activations by token and block: up to 3.2 times the KL divergence of INT8, next to
    nothing beside INT4."""
    monkeypatch.setattr(weight_only_int4, "BUDGET", 1e9)  # INT4 throughout
    it = subject(case)
    for name in PARTS:
        path = tmp_path / f"{name}.onnx"
        if kind == "fp32":
            graphs.save(it.parts[name].build(Float()), path)
        else:
            written(kind, name, it, tmp_path)
        lowered = lowering.lower(path, windows(it.config.settings()))
        assert lowered.keys() == ({"cuda"} if kind == "fp32" else {"cpu-native", "cuda"})
        if "cpu-native" in lowered and native.library() is not None:
            ours = tmp_path / lowered["cpu-native"]
            portable, found = (real(it, name, graph).kl for graph in (path, ours))
            assert found < {"int8": 4, "int4": 1.1}[kind] * portable


def test_w8a8_takes_both_parts(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    it = subject("flan")
    (tmp_path / "scratch").mkdir()
    for name in PARTS:
        said = w8a8.write_w8a8(
            name, it.parts[name], it.examples[name], tmp_path, tmp_path / "scratch", quiet
        )
        assert said["kl"] == pytest.approx(real(it, name, tmp_path / f"{name}.onnx").kl, rel=0.02)
        assert 0 < said["kl"] < 0.2
