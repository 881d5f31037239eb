"""The parity ladder: quiet on a good bundle, and on a damaged one it names the stage and the layer."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tiny import edit_json

from vlm_edge import VLM
from vlm_edge.errors import CheckpointMissing, ExtraMissing, VerificationError
from vlm_edge.export.verification import measures
from vlm_edge.export.verification.report import STAGES, TEXT_STAGES, Report, Rung
from vlm_edge.export.verify import store, verify
from vlm_edge.runtime.bundle import file_digest
from vlm_edge.runtime.manifest import read_manifest

NEW_TOKENS = 6


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files as they are: damage that checksums do not see."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        file = folder / name
        entry |= {"size": file.stat().st_size, "sha256": file_digest(file)}
    path.write_text(json.dumps(manifest))


def disturb(folder: Path, engine: str, tensor: str) -> None:
    """Change one stored weight of the engine, as a wrong conversion would."""
    graph = folder / json.loads((folder / "manifest.json").read_text())["engines"][engine]["graph"]
    weight = ir.load(graph).graph.initializers[tensor].const_value
    assert isinstance(weight, ir.ExternalTensor), "choose a weight that lies in the data file"
    data = np.memmap(folder / weight.location, mode="r+", dtype=np.float32, offset=weight.offset,
                     shape=weight.size)  # fmt: skip
    data[: weight.size // 4] *= 1.5
    data.flush()
    rehash(folder)


@pytest.mark.verifies("llava", "`vlm verify` ladder")
@pytest.mark.parametrize("case", ["clip-llama-native", "siglip-qwen2-v4", "dinov2-swiglu"])
def test_a_good_bundle_passes(
    case: str,
    bundle: Callable[..., Path],
    checkpoint: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    images = [pictures["wide.png"], pictures["rotated.jpg"]]
    report = verify(bundle(case), checkpoint(case), images, "what is it?", NEW_TOKENS)
    assert report.ok
    assert report.divergence is None
    assert {rung.name for rung in report.rungs if rung.probe == "picture"} == set(STAGES)
    assert {rung.name for rung in report.rungs if rung.probe == "text"} == set(TEXT_STAGES)
    assert all(rung.ok for rung in report.rungs)
    assert "greedy tokens are the same" in report.sentence()


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "vision layer": (
        lambda folder: disturb(folder, "vision", "vision.encoder.layers.1.attention.v_proj.weight"),
        "vision", "vision.layers.1"),
    "first vision layer": (
        lambda folder: disturb(folder, "vision", "vision.encoder.layers.0.mlp.down_proj.weight"),
        "vision", "vision.layers.0"),
    "connector": (
        lambda folder: disturb(folder, "connector", "connector.linear_2.weight"), "connector", None),
    "language layer": (
        lambda folder: disturb(folder, "llm", "llm.layers.1.mlp.up_proj.weight"),
        "prefill logits", "llm.layers.1"),
    "language head": (
        lambda folder: disturb(folder, "llm", "llm.lm_head.weight"), "prefill logits", None),
    "pixels": (
        lambda folder: edit_json(folder / "manifest.json", "image.mean", [0.48, 0.46, 0.41]),
        "pixels", None),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "stage", "layer"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_bundle_is_named_by_stage_and_layer(
    damage: Callable[[Path], None],
    stage: str,
    layer: str | None,
    tmp_path: Path,
    bundle: Callable[..., Path],
    checkpoint: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    folder = shutil.copytree(bundle("dinov2-swiglu"), tmp_path / "bundle")
    damage(folder)
    with VLM.load(folder):  # the bundle itself is in order
        pass
    images = [pictures["tall.png"]]
    report = verify(folder, checkpoint("dinov2-swiglu"), images, "what is it?", NEW_TOKENS)
    assert not report.ok
    found = report.divergence
    assert found is not None
    assert (found.name, found.layer) == (stage, layer)
    assert found.tolerance is not None
    assert found.value > found.tolerance
    assert stage in report.sentence()
    above = STAGES[STAGES.index(stage) + 1 :]
    assert not [rung for rung in report.rungs if rung.probe == "picture" and rung.name in above]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_stages_are_reported_and_exact_ones_judged(
    precision: str,
    bundle: Callable[..., Path],
    checkpoint: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    folder, source = bundle("dinov2-swiglu", precision), checkpoint("dinov2-swiglu")
    report = verify(folder, source, [pictures["wide.png"]], "what is it?", NEW_TOKENS)
    assert report.ok
    judged = {rung.name for rung in report.rungs if rung.ok is not None}
    assert judged >= {"token ids", "pixels"}
    figures = {(r.name, r.metric): r.value for r in report.rungs if r.probe == "picture"}
    assert 0.9 < figures["vision", "cosine"] < 1
    assert 0 < figures["prefill logits", "KL divergence, nats"] < 1
    assert 0 <= figures["greedy tokens", "top-1 agreement"] <= 1
    assert 0 <= figures["greedy tokens", "tokens before the first difference"] <= NEW_TOKENS


def test_the_report_is_stored_in_the_manifest(
    tmp_path: Path, bundle: Callable[..., Path], checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(bundle("siglip-qwen2"), tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps: list[tuple[str, int, int]] = []
    report = verify(
        folder,
        checkpoint("siglip-qwen2"),
        [],
        new_tokens=2,
        progress=lambda *step: steps.append(step),
    )
    store(folder, report)
    parity = read_manifest(folder).parity
    assert parity == json.loads(json.dumps(report.to_json()))
    assert parity is not None
    assert parity["ok"] is True
    assert steps == [("verify", done, len(TEXT_STAGES)) for done in range(len(TEXT_STAGES) + 1)]
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["manifest.json"]
    VLM.load(folder).close()


def test_a_checkpoint_that_transformers_cannot_load(
    tmp_path: Path, bundle: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointMissing) as caught:
        verify(bundle("siglip-qwen2"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("llava", "reference"):
        monkeypatch.delitem(sys.modules, f"vlm_edge.export.verification.{name}", raising=False)
    with pytest.raises(ExtraMissing, match=rf"{module}.*vlm-edge\[verify\]"):
        verify(bundle("siglip-qwen2"), tmp_path)


def test_an_architecture_without_reference(
    tmp_path: Path, bundle: Callable[..., Path], checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(bundle("siglip-qwen2"), tmp_path / "bundle")
    edit_json(folder / "manifest.json", "architecture", "otter")
    with pytest.raises(VerificationError, match="otter"):
        verify(folder, checkpoint("siglip-qwen2"))


def test_measures() -> None:
    generator = np.random.default_rng(0)
    expected = generator.normal(size=(5, 7)).astype(np.float32)
    assert measures.relative_error(expected, expected) == 0
    one_row = expected.copy()
    one_row[3] *= 1.25
    assert measures.relative_error(one_row, expected) == pytest.approx(0.25)
    assert measures.relative_error(expected[:4], expected) == float("inf")
    assert measures.relative_error(expected * np.float32("nan"), expected) == float("inf")
    assert measures.largest_difference(expected + 2, expected) == pytest.approx(2)
    assert measures.cosine(3 * expected, expected) == pytest.approx(1)
    assert measures.cosine(-expected, expected) == pytest.approx(-1)
    assert measures.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert measures.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert measures.first_difference([1, 2], [1, 2, 3]) == 2


def test_the_lowest_failing_rung_is_the_divergence() -> None:
    def rung(name: str, probe: str, value: float, layer: str | None = None) -> Rung:
        return Rung(name, probe, layer, "relative error", value, 1e-4)

    rungs = (
        rung("connector", "picture", 1.0),
        rung("vision", "text", 1.0),
        rung("vision", "text", 0.5, "vision.layers.2"),
        rung("pixels", "text", 0.0),
        Rung("vision", "picture", None, "cosine", 0.2, None),
    )
    report = Report("a reference", "a checkpoint", {"vision": "fp32"}, {}, rungs)
    assert report.divergence == rungs[2]
    assert "vision.layers.2" in report.sentence()
    assert "0.5" in report.sentence()
