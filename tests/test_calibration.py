"""Calibration: pictures, ranges against transformers' own activations, and the choice of a method."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import scene
from reference import Reference
from small_graph import run, write

from vlm_edge.calibration import data as data_module
from vlm_edge.calibration import ranges as ranges_module
from vlm_edge.calibration.data import FEWEST, HOLD_OUT, MOST, load
from vlm_edge.calibration.ranges import (
    CHANNELS,
    RANGE,
    FeatureError,
    Ranges,
    feature_error,
    magnitudes,
    migration,
)
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


def test_the_built_in_pictures() -> None:
    found = load(None)
    assert len(found.paths) >= 16
    assert len(found.held_out) >= 4


def test_unusable_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match=r"no calibration folder .*0\.png"):
        load(folder / "0.png")
    for index in range(FEWEST - 1):
        shutil.copy(folder / f"{index}.png", tmp_path)
    with pytest.raises(CalibrationError, match=f"{FEWEST - 1} picture.* at least {FEWEST}"):
        load(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"broken\.jpg"):
        load(tmp_path)


# -- ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [99.99, 99.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 17, 31), (1, 300, 100)])
def test_the_graph_keeps_the_largest_magnitudes(
    shape: tuple[int, ...], percentile: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges_module, "PERCENTILE", percentile)
    path = write(
        tmp_path / "g.onnx",
        lambda op, x: [(kept := magnitudes(op, x["x"]))[RANGE], kept[CHANNELS]],
        {"x": ("float32", ("a", "b", "c"))},
        {"y": ("float32", ("n",)), "z": ("float32", ("c",))},
    )
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found, channels = run(path, {"x": values})
    np.testing.assert_array_equal(channels, np.abs(values).max(axis=(0, 1)))
    falling = np.sort(np.abs(values).ravel())[::-1]
    np.testing.assert_array_equal(found, falling[: len(found)])
    share = values.size * (1 - percentile / 100)
    assert max(1, share - 0.01) <= len(found) <= share + 1.01


def outputs(**values: list[float]) -> dict[str, np.ndarray]:
    """Of layers with one input channel."""
    largest = {RANGE + name: np.array(v, np.float32) for name, v in values.items()}
    return largest | {CHANNELS + name: np.array(v[:1], np.float32) for name, v in values.items()}


def test_ranges_over_pictures() -> None:
    found = Ranges()
    found.add({**outputs(a=[5, 3], b=[1, 0.5]), "features": np.array([99.0])})
    found.add(outputs(a=[4, 3.5], b=[7, 0.25]))
    assert found.minmax == {"a": 5.0, "b": 7.0}
    assert found.percentile == {"a": 3.5, "b": 0.5}
    found.share({"a": "a", "b": "b", "c": "b"})
    assert found.minmax == {"a": 5.0, "b": 7.0, "c": 7.0}
    assert found.percentile == {"a": 3.5, "b": 0.5, "c": 0.5}
    assert {path: float(c[0]) for path, c in found.channels.items()} == {"a": 5, "b": 7, "c": 7}
    for bad in (np.nan, np.inf):
        with pytest.raises(CalibrationError, match="input of a is not finite"):
            found.add(outputs(a=[bad]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_feature_error(pictures: int, tokens: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    exact = generator.standard_normal((pictures, 1, tokens, 5)).astype(np.float32)
    other = exact + generator.normal(0, 0.2, exact.shape).astype(np.float32)
    found = feature_error(zip(other, exact, strict=True))
    a, b = exact.reshape(-1, 5).astype(float), other.reshape(-1, 5).astype(float)
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_feature_error_of_nothing() -> None:
    error = FeatureError()
    error.add(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32))
    assert (error.cosine, error.relative) == (0.0, 0.0)


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
    inputs = static.pixels(data, model.image, tmp_path)
    for name in CONNECTED:
        floats[name] = static.run_float(
            name, model.parts[name], inputs, data, tmp_path, lambda *_: None
        )
        inputs = floats[name].outputs

    theirs = reference(case)
    pixels = theirs.inputs("<image>" * COUNT, data.paths)["pixel_values"]
    np.testing.assert_array_equal(floats["vision"].inputs, pixels.numpy())
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
        found = floats[name].ranges.minmax
        assert found
        for path, value in found.items():
            assert path.startswith(root)
            # transformers' own module names where ours differ
            theirs_path = path.replace(".layers.", ".layer.") if "dinov2" in case else path
            assert value == pytest.approx(largest[theirs_path], rel=1e-4), path
    read = {path for path in largest if path.startswith("multi_modal_projector")}
    assert set(floats["connector"].ranges.minmax) == read


def test_migration_levels_the_channels() -> None:
    channels = np.array([100, 1, 0.01, 0, 3], np.float32)
    weights = np.array([0.1, 0.1, 2, 1, 0], np.float32)
    scales = migration(channels, weights, 0.5)
    np.testing.assert_allclose(scales[:3] ** 2, channels[:3] / weights[:3], rtol=1e-6)
    assert list(scales[3:]) == [1, 1]  # never read, or never there: left alone
    np.testing.assert_allclose(migration(channels, weights, 1.0)[:3], channels[:3], rtol=1e-6)


@pytest.mark.parametrize("case", ["clip-llama", "siglip-qwen2", "dinov2-swiglu"])
def test_smoothing_changes_nothing_but_the_rounding(
    case: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:  # fmt: skip
    """Whatever the strength, features stay those of full precision within INT8's error, and no
    multiplication is left in front of a layer that has a norm before it."""
    made = export_with("smooth-80", checkpoint(case), folder, tmp_path / "b")
    exact = Bundle(bundle(case))
    pixels = static.pixels(load(folder), made.manifest.image, tmp_path)[:1]
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
    assert set(static.methods("auto")) == {"minmax", "percentile", "smooth-65", "smooth-80"}
    assert static.methods("minmax") == ("minmax",)
    with pytest.raises(SettingError, match="'entropy'; known are auto, minmax, percentile"):
        static.methods("entropy")


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
    pixels = static.pixels(data, model.image, tmp_path)[list(data.held_out)]
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
        calibration_images=None if parts == {"llm"} else folder,
        progress=lambda step, *_: steps.add(step),
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "b")
    assert set(report.errors) == parts
    assert bool(manifest.calibration["data"]) == ("llm" not in parts)
    assert ("calibrate vision" in steps) == (parts == {"connector"})  # its outputs are needed
    assert sum(report.sizes.values()) == Bundle(tmp_path / "b").size()
    assert report.peak_rss_anon > 1 << 20
    if parts == {"llm"}:
        assert 0 < report.errors["llm"]["weight_error"]["mean"] < 0.02
        assert (
            report.errors["llm"]["weight_error"]["worst"]
            >= report.errors["llm"]["weight_error"]["mean"]
        )


@pytest.mark.parametrize("plan", ["llm=int8", "llm=fp32"])
def test_pictures_that_nothing_uses_are_refused(
    plan: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(SettingError, match="no part's precision uses them"):
        export(
            checkpoint("clip-llama"), tmp_path / "b", precision=PrecisionPlan.parse(plan),
            calibration_images=folder,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
