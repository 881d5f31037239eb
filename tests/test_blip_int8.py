"""Static INT8 of BLIP-2's and InstructBLIP's encoder and Q-Former: calibrated with the instruction of each
tile, every linear layer quantized, post-norm blocks left whole, and the lowered graphs say the same."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from blip_parts import Family, Made, ids_of, make, pixels_of, run, write

from vlm_edge.calibration import cache
from vlm_edge.export import static
from vlm_edge.export.lowering import cpu, native
from vlm_edge.export.static import Feed, Floats, Tiles
from vlm_edge.runtime import native as kernels
from vlm_edge.runtime.ort import open_session

TILES = Tiles(tuple("abcdefgh"), (1,) * 8, (3, 7))
PARTS = ("vision", "connector")
LAYERS = {"vision": 3 * 6, "connector": 3 * 6 + 2 * 4 + 1}  # of BLIP-2; three layers each


def silent(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Calibrated:
    made: Made
    floats: dict[str, Floats]
    folder: Path  # scratch: the float graphs lie there

    def write(self, part: str, method: str, folder: Path) -> dict[str, Any]:
        """`<part>.onnx` in INT8; what the manifest would say."""
        built, floats = self.made.parts[part], self.floats[part]
        return static.write_int8(
            part, built, floats, TILES, (method,), 10.0, folder, folder, silent
        )


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["Blip2", "InstructBlip"])
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, roots: Path
) -> Calibrated:
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family)
    made = make(folder, family)
    rows, floats = pixels_of(made.parts["vision"], len(TILES.names)), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "root", lambda: roots)
        for part in PARTS:
            floats[part] = static.run_float(
                part, made.parts[part], rows, TILES, folder, silent, extras_of(made, part)
            )
            rows = floats[part].outputs
    return Calibrated(made, floats, folder)


def extras_of(made: Made, part: str) -> list[Feed] | None:
    """Instructions of 1 to 8 tokens."""
    if part == "vision" or not made.connector.instructed:
        return None
    lengths = range(1, 1 + len(TILES.names))
    return [{"instruction_ids": ids_of(made.connector, 1, length)[0]} for length in lengths]


def test_outputs_are_those_of_each_tile_by_itself(calibrated: Calibrated) -> None:
    for part, floats in calibrated.floats.items():
        path = calibrated.folder / f"{part}.onnx"
        write(calibrated.made.parts[part], path)
        for tile in range(len(TILES.names)):
            (expected,) = run(path, floats.feeds[tile])
            np.testing.assert_allclose(floats.outputs[tile], expected[0], atol=1e-5)
    extras = calibrated.floats["connector"].feeds.extras
    if calibrated.made.connector.instructed:
        assert [len(extra["instruction_ids"]) for extra in extras] == list(range(1, 9))


@pytest.mark.parametrize("method", ["minmax", "smooth-65"])
@pytest.mark.parametrize("part", PARTS)
def test_every_linear_layer_is_int8(
    part: str, method: str, calibrated: Calibrated, tmp_path: Path
) -> None:
    said = calibrated.write(part, method, tmp_path)
    assert said["cosine"] > 0.98
    assert 0 < said["relative_error"] < 0.2
    assert {row["precision"] for row in said["layers"].values()} == {"int8"}
    assert list(said["layers"]) == calibrated.made.layers(part)
    text = 2 * 2 if part == "connector" and calibrated.made.connector.instructed else 0
    assert len(said["layers"]) == LAYERS[part] + text
    graph = ir.load(tmp_path / f"{part}.onnx").graph
    products = [node for node in graph if node.op_type == "MatMul"]
    assert len(products) == len(said["layers"])
    for node in products:
        assert {value.producer().op_type for value in node.inputs} == {"DequantizeLinear"}
    kinds = Counter(node.op_type for node in graph)
    assert kinds["QuantizeLinear"] < len(products)  # layers that share an input share its rounding
    assert kinds["Attention"] > 0


def test_smoothing_stays_out_of_norms_that_others_read(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    """A post-norm block's norm is also the next residual: what is divided for the next layer must not be
    divided there. In the pre-norm encoder every norm takes it."""
    calibrated.write("connector", "smooth-65", tmp_path)
    graph = ir.load(tmp_path / "connector.onnx").graph
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    assert norms[-1].outputs[0].name == "connector.layers.2.output"
    assert not any("smooth" in str(value.name) for node in norms for value in node.inputs[1:])
    divided = {node.inputs[0] for node in graph if node.op_type == "Mul"}
    assert any(norm.outputs[0] in divided for norm in norms)
    calibrated.write("vision", "smooth-65", tmp_path)
    graph = ir.load(tmp_path / "vision.onnx").graph
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    assert sum("smooth" in str(node.inputs[1].name) for node in norms) == len(norms) - 1


@pytest.mark.parametrize("method", ["minmax", "smooth-65"])
@pytest.mark.parametrize("part", PARTS)
def test_the_lowered_graphs_say_the_same(
    part: str, method: str, calibrated: Calibrated, tmp_path: Path
) -> None:
    calibrated.write(part, method, tmp_path)
    portable, floats = tmp_path / f"{part}.onnx", calibrated.floats[part]
    lowered = tmp_path / str(cpu.lower(portable))
    kinds = Counter(node.op_type for node in ir.load(lowered).graph)
    assert kinds["MatMulIntegerToFloat"] == len(calibrated.made.layers(part))
    assert not kinds["MatMul"]
    own = tmp_path / str(native.lower(portable, {}))
    graphs = [portable, lowered] + [own] * (kernels.library() is not None)
    said, cpus, *natives = (
        np.concatenate([session.run(None, floats.feeds[i])[0] for i in range(len(TILES.names))])
        for session in (open_session(graph, part, 1) for graph in graphs)
    )
    assert np.abs(cpus - said).max() < 0.02 * np.abs(said).max()
    error = np.linalg.norm(said - floats.outputs)
    for ours in natives:  # their scales are each token's own: nearer to full precision
        assert 0 < np.linalg.norm(ours - floats.outputs) < 1.1 * error
        assert np.linalg.norm(ours - said) < 2 * error


def test_our_kernels_take_residuals_and_no_post_norm(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    """Joined are layers with what only they read: the residual behind `dense`, the activation between.
    The norms stay, and with them the layers' outputs that `vlm verify` compares."""
    calibrated.write("connector", "minmax", tmp_path)
    portable = ir.load(tmp_path / "connector.onnx").graph
    norms = sum(node.op_type == "LayerNormalization" for node in portable)
    graph = ir.load(tmp_path / str(native.lower(tmp_path / "connector.onnx", {}))).graph
    kinds = Counter(node.op_type for node in graph)
    assert kinds["LayerNormalization"] == norms
    names = {value.name for node in graph for value in node.outputs}
    assert {f"connector.layers.{index}.output" for index in range(3)} <= names
    assert not kinds["Gelu"] + kinds["QuantizeLinear"] + kinds["MatMul"]
    assert kinds["Add"] == int(calibrated.made.connector.instructed)  # words + positions


def test_some_layers_in_float(calibrated: Calibrated, tmp_path: Path) -> None:
    """What the budget puts back to float reads the same smoothed input; residuals do not."""
    floats, made = calibrated.floats["connector"], calibrated.made
    keep = [path for path in made.layers("connector") if path.endswith((".key", ".dense"))]
    smooth = floats.quantizer("smooth-65")
    errors = []
    for exact in (made.layers("connector"), keep, []):
        quantizer = smooth.keeping(exact, floats.layers.readers)
        graph = write(made.parts["connector"], tmp_path / f"{len(exact)}.onnx", quantizer)
        found = np.concatenate([run(graph, floats.feeds[i])[0] for i in TILES.held_out])
        errors.append(np.linalg.norm(found - floats.outputs[TILES.held_out]))
    none, some, every = errors
    assert none < 1e-4 < some < every


@pytest.mark.parametrize("change", ["nothing", "word", "length"])
def test_the_instruction_is_part_of_the_cache_key(
    change: str, calibrated: Calibrated, roots: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not calibrated.made.connector.instructed:
        pytest.skip("BLIP-2 has none")
    shutil.copytree(roots, tmp_path / "cache")
    monkeypatch.setattr(cache, "root", lambda: tmp_path / "cache")
    ran: list[str] = []
    original = static._observe
    monkeypatch.setattr(static, "_observe", lambda name, *a: ran.append(name) or original(name, *a))
    extras = extras_of(calibrated.made, "connector")
    assert extras is not None
    ids = extras[2]["instruction_ids"]
    changed = {"nothing": ids, "word": ids[::-1] + 1, "length": ids[:-1]}[change]
    extras[2] = {"instruction_ids": changed % calibrated.made.connector.vocabulary}
    rows = calibrated.floats["vision"].outputs
    part = calibrated.made.parts["connector"]
    found = static.run_float("connector", part, rows, TILES, tmp_path, silent, extras)
    assert ran == ([] if change == "nothing" else ["connector"])
    same = np.array_equal(found.outputs[2], calibrated.floats["connector"].outputs[2])
    assert same == (change == "nothing")
