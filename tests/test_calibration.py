"""Calibration: pictures, ranges against transformers' own activations, and the choice of a method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest
from pictures import scene
from reference import Reference
from small_graph import run

from vlm_edge.calibration import data as data_module
from vlm_edge.calibration import ranges as ranges_module
from vlm_edge.calibration.data import FEWEST, HOLD_OUT, MOST, load
from vlm_edge.cli import export as cli_export
from vlm_edge.errors import CalibrationError, SettingError
from vlm_edge.export import static
from vlm_edge.export.pipeline import export, read_model
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.manifest import read_manifest

COUNT = 9  # pictures; 3 and 7 are held out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration")
    for index in range(COUNT):
        scene(40 + index, 35, index).save(path / f"{index}.png")
    return path


# -- pictures ---------------------------------------------------------------------------------


def test_pictures_are_sorted_and_every_fourth_is_held_out(folder: Path) -> None:
    found = load(folder)
    assert [path.name for path in found.paths] == [f"{index}.png" for index in range(COUNT)]
    assert found.held_out == (3, 7)
    assert HOLD_OUT == 4


def test_the_hash_follows_the_contents(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "notes.txt").write_text("no picture")
    (copy / "below").mkdir()
    shutil.copy(copy / "0.png", copy / "below" / "x.png")
    assert load(copy).sha256 == load(folder).sha256
    shutil.move(copy / "0.png", copy / "z.PNG")  # another order, other held-out pictures
    assert load(copy).paths[-1].name == "z.PNG"
    assert load(copy).sha256 != load(folder).sha256


def test_many_pictures_are_thinned_evenly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "MOST", 4)
    assert [path.name for path in load(folder).paths] == ["0.png", "2.png", "4.png", "6.png"]
    assert MOST >= FEWEST >= HOLD_OUT  # so that something is held out


def test_prompts_name_one_picture_or_several(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    lines = [
        {"image": "2.png", "prompt": "What is it?"},
        {"images": ["1.png", "0.png"], "prompt": "Which is larger?"},
        {"images": ["3.png"], "prompt": "And this?"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (copy / "prompts.jsonl").write_text(text, encoding="utf-8-sig")  # as some editors save it
    (copy / "texts.txt").write_text("A text.\n\nAnother one.\n")
    assert [prompt.pictures for prompt in load(copy).prompts] == [(2,), (1, 0), (3,), (), ()]
    assert load(copy).sizes == tuple((40 + index, 35) for index in range(COUNT))
    before = load(copy).sha256
    (copy / "prompts.jsonl").write_text(text.replace('"1.png", "0.png"', '"0.png", "1.png"'))
    assert load(copy).sha256 != before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"image": "0.png"}', "line 2 is not"), ("[]", "line 2 is not"), ("7", "line 2 is not"),
        ('{"image": "0.png", "prompt": "\\ud800"}', "line 2 is not"),
        ('{"image": "x.png", "prompt": "Hi"}', "line 2 names no picture"),
        ('{"images": [], "prompt": "Hi"}', "line 2 names no picture"),
        ('{"images": "0.png", "prompt": "Hi"}', "line 2 names no picture"),
        ('{"images": [{}], "prompt": "Hi"}', "line 2 names no picture"),
        ('{"image": "0.png", "prompt": " "}', "line 2 has no text"),
        ('{"image": "0.png", "prompt": 3}', "line 2 has no text"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_is_named(line: str, why: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "prompts.jsonl").write_text('{"image": "0.png", "prompt": "Hi"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=why):
        load(copy)


def test_the_built_in_pictures() -> None:
    found = load(None)
    assert len(found.paths) >= 16
    assert len(found.held_out) >= 4


def test_unusable_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match=r"0\.png is a file: give the folder"):
        load(folder / "0.png")
    for index in range(FEWEST - 1):
        shutil.copy(folder / f"{index}.png", tmp_path)
    with pytest.raises(CalibrationError, match=f"{FEWEST - 1} picture.* at least {FEWEST}"):
        load(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"broken\.jpg"):
        load(tmp_path)


# -- ranges -------------------------------------------------------------------------------------


CONNECTED = {"vision": "vision_tower", "connector": "multi_modal_projector"}


@pytest.mark.parametrize("case", ["clip-llama-native", "siglip-qwen2-v4", "dinov2-llama"])
def test_ranges_are_those_of_transformers_activations(
    case: str, folder: Path, tmp_path: Path,
    checkpoint: Callable[[str], Path], reference: Callable[[str], Reference],
) -> None:  # fmt: skip
    """Every linear layer, in pipeline order, over the pictures that are not held out."""
    import torch

    _, model, _ = read_model(checkpoint(case))
    data = load(folder)
    floats = {}
    inputs, tiles = static.pixels(data, model.image, model.tiler(), tmp_path)
    for name in CONNECTED:
        floats[name] = static.run_float(
            name, model.parts[name], inputs, tiles, tmp_path, lambda *_: None
        )
        inputs = floats[name].outputs

    theirs = reference(case)
    pixels = theirs.inputs("<image>" * COUNT, data.paths)["pixel_values"]
    np.testing.assert_array_equal(floats["vision"].feeds.rows, pixels.numpy())
    largest: dict[str, float] = {}
    handles = []
    for path, module in theirs.model.model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(_: Any, args: Any, path: str = path) -> None:
                largest[path] = max(largest.get(path, 0.0), float(args[0].abs().max()))

            handles.append(module.register_forward_pre_hook(note))
    kept = [index for index in range(COUNT) if index not in data.held_out]
    with torch.inference_mode():
        theirs.model.model.get_image_features(pixels[kept])
    for handle in handles:
        handle.remove()
    for name, root in CONNECTED.items():
        found = floats[name].ranges.limits["minmax"]
        assert found
        for path, value in found.items():
            assert path.startswith(root)
            # transformers' own module names where ours differ
            theirs_path = path.replace(".layers.", ".layer.") if "dinov2" in case else path
            assert value == pytest.approx(largest[theirs_path], rel=1e-4), path
    read = {path for path in largest if path.startswith("multi_modal_projector")}
    assert set(floats["connector"].ranges.limits["minmax"]) == read


@pytest.mark.parametrize("case", ["clip-llama", "siglip-qwen2", "dinov2-swiglu"])
def test_smoothing_changes_nothing_but_the_rounding(
    case: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:  # fmt: skip
    """Whatever the strength, features stay those of full precision within INT8's error, and no
    multiplication is left in front of a layer that has a norm before it."""
    made = export_with("smooth-80", checkpoint(case), folder, tmp_path / "b")
    exact = Bundle(bundle(case))
    pixels = static.pixels(load(folder), made.manifest.image, made.tiler(), tmp_path)[0][:1]
    found, expected = (
        run(b.graph("vision", "cpu"), {"pixel_values": pixels})[0] for b in (made, exact)
    )
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.99
    assert made.manifest.calibration["parts"]["vision"]["method"] == "smooth-80"
    graph = ir.load(made.graph("vision", "cpu")).graph
    smoothed = [n for n in graph if n.op_type == "Mul" and "smooth" in (n.inputs[1].name or "")]
    before = {n.inputs[0].producer().op_type for n in smoothed}
    assert smoothed
    assert not before & {"LayerNormalization"}
    norms = [n for n in graph if n.op_type == "LayerNormalization"]
    assert sum("smooth" in (n.inputs[1].name or "") for n in norms) >= 2


# -- the choice -------------------------------------------------------------------------------


def test_methods() -> None:
    known = get_args(static.Method)
    assert set(known) == {"auto", *ranges_module.METHODS, *ranges_module.STRENGTHS}
    assert known == cli_export.METHODS
    assert {"minmax", "percentile", "mse", "smooth-65", "smooth-80"} == set(static.methods("auto"))
    for method in known[1:]:
        assert static.methods(method) == (method,)
    with pytest.raises(SettingError, match="'median'; known are auto, minmax, average, percentile"):
        static.methods("median")


@pytest.mark.parametrize("method", ["average", "entropy", "mse"])
def test_every_method_can_be_asked_for(
    method: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    """The scales in the graph are the method's ranges over 127."""
    made = export_with(method, checkpoint("clip-llama"), folder, tmp_path / "b")
    assert made.manifest.calibration["parts"]["vision"]["method"] == method
    _, model, _ = read_model(checkpoint("clip-llama"))
    data = load(folder)
    pixels, tiles = static.pixels(data, model.image, model.tiler(), tmp_path)
    floats = static.run_float(
        "vision", model.parts["vision"], pixels, tiles, tmp_path, lambda *_: None
    )
    limits = set(floats.ranges.limits[method].values())
    assert limits != set(floats.ranges.limits["minmax"].values())
    graph = ir.load(made.graph("vision", "cpu")).graph
    scales = [
        ir.convenience.get_const_tensor(node.inputs[1]).numpy()
        for node in graph if node.op_type == "QuantizeLinear"
    ]  # fmt: skip
    assert scales
    np.testing.assert_allclose(sorted({127 * float(s) for s in scales}), sorted(limits), rtol=1e-5)


def export_with(method: str, checkpoint: Path, folder: Path, output: Path) -> Bundle:
    export(
        checkpoint, output, precision=PrecisionPlan.parse("vision=int8,connector=int8"),
        calibration_images=folder, calibration_method=method,
    )  # fmt: skip
    return Bundle(output)


@pytest.mark.parametrize("percentile", [60.0, 97.0])
@pytest.mark.parametrize("order", [("percentile", "minmax"), ("minmax", "percentile")])
def test_auto_keeps_the_method_that_errs_least(
    order: tuple[str, str], percentile: float, folder: Path, tmp_path: Path,
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At these sizes 99.99 % of a picture is all of it: other percentiles make the methods differ.
    The better one is kept whether it was tried first or last."""
    monkeypatch.setattr(static, "CANDIDATES", order)
    monkeypatch.setattr(ranges_module, "PERCENTILE", percentile)
    source = checkpoint("siglip-qwen2")
    made = {
        method: export_with(method, source, folder, tmp_path / method)
        for method in ("minmax", "percentile", "auto")
    }
    said = {method: bundle.manifest.calibration["parts"] for method, bundle in made.items()}
    for part in ("vision", "connector"):
        errors = {m: said[m][part]["relative_error"] for m in ("minmax", "percentile")}
        assert errors["minmax"] != errors["percentile"]
        best = min(errors, key=errors.__getitem__)
        auto = said["auto"][part]
        assert auto["method"] == best
        assert auto["relative_error"] == errors[best]
        assert {m: t["relative_error"] for m, t in auto["tried"].items()} == errors
        for name in (f"{part}.onnx", f"{part}.cpu.onnx"):
            digests = {m: bundle.manifest.files[name].sha256 for m, bundle in made.items()}
            assert digests["auto"] == digests[best]
    if percentile == 60.0:  # nearly half of the values clipped: this must lose
        assert said["auto"]["vision"]["method"] == "minmax"


def test_the_error_in_the_manifest_is_that_of_the_held_out_pictures(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    made = export_with("minmax", checkpoint("siglip-qwen2"), folder, tmp_path / "b")
    exact = Bundle(bundle("siglip-qwen2"))
    _, model, _ = read_model(checkpoint("siglip-qwen2"))
    data = load(folder)
    every, tiles = static.pixels(data, model.image, model.tiler(), tmp_path)
    pixels = every[tiles.held_out]
    inputs = list(pixels[:, None])  # each part is measured on the float outputs of the one before
    said = made.manifest.calibration
    for part, feed in (("vision", "pixel_values"), ("connector", "features")):
        expected = [run(exact.graph(part, "cpu"), {feed: x})[0] for x in inputs]
        found = [run(made.graph(part, "cpu"), {feed: x})[0] for x in inputs]
        off = np.linalg.norm(np.ravel(found) - np.ravel(expected)) / np.linalg.norm(expected)
        assert said["parts"][part]["relative_error"] == pytest.approx(off, rel=1e-3)
        inputs = expected
    used = {"sha256": data.sha256, "pictures": COUNT, "held_out": 2}
    assert {key: said["data"][key] for key in used} == used
    assert 0 < said["parts"]["vision"]["relative_error"] < 0.2
    assert 0.98 < said["parts"]["connector"]["cosine"] < 1


@pytest.mark.parametrize(
    ("plan", "parts"), [("connector=int8", {"connector"}), ("llm=int8", {"llm"})]
)
def test_only_what_is_quantized_is_calibrated(
    plan: str, parts: set[str], folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    steps = set()
    report = export(
        checkpoint("clip-llama"), tmp_path / "b", precision=PrecisionPlan.parse(plan),
        calibration_images=folder, progress=lambda step, *_: steps.add(step),
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "b")
    assert set(report.errors) == parts
    assert manifest.calibration["data"]["pictures"] == COUNT
    assert "calibrate vision" in steps  # its outputs are needed
    assert ("write vision int8" in steps) == ("vision" in parts)
    assert sum(report.sizes.values()) == Bundle(tmp_path / "b").size()
    assert report.peak_rss_anon > 1 << 20
    if parts == {"llm"}:
        assert 0 < report.errors["llm"]["weight_error"]["mean"] < 0.02
        assert (
            report.errors["llm"]["weight_error"]["worst"]
            >= report.errors["llm"]["weight_error"]["mean"]
        )


@pytest.mark.parametrize("plan", ["vision=fp32", "llm=fp32"])
def test_pictures_that_nothing_uses_are_refused(
    plan: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(SettingError, match="no part's precision uses them"):
        export(
            checkpoint("clip-llama"), tmp_path / "b", precision=PrecisionPlan.parse(plan),
            calibration_images=folder,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
