"""A checkpoint or bundle that cannot be used is refused by name, and nothing half-written stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import edit_json

from vlm_edge import VLM
from vlm_edge.errors import (
    BundleDamaged,
    BundleExists,
    BundleFormatMismatch,
    BundleMissing,
    CheckpointMissing,
    TensorMissing,
    TensorShapeMismatch,
    UnknownArchitecture,
    UnsupportedConfig,
    VlmEdgeError,
)

Damage = Callable[[Path], object]


def remove(pattern: str) -> Damage:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def cut(pattern: str, keep: float) -> Damage:
    """Truncate to the first `keep` of the file."""

    def damage(folder: Path) -> None:
        for path in folder.glob(pattern):
            data = path.read_bytes()
            path.write_bytes(data[: int(len(data) * keep)])

    return damage


def config(key: str, value: Any, file: str = "config.json") -> Damage:
    return lambda folder: edit_json(folder / file, key, value)


def tensors(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        loaded = load_file(folder / "model.safetensors")
        change(loaded)
        save_file(loaded, folder / "model.safetensors")

    return damage


def without(name: str) -> Damage:
    return tensors(lambda loaded: loaded.pop(name))


def narrower(name: str) -> Damage:
    return tensors(lambda loaded: loaded.update({name: loaded[name][:-1].copy()}))


@dataclass(frozen=True)
class Bad:
    """What is done to a good checkpoint, and how the refusal reads."""

    damage: Damage
    error: type[VlmEdgeError]
    words: tuple[str, ...]
    case: str = "clip-llama"
    arch: str | None = None


K_PROJ = "language_model.model.layers.1.self_attn.k_proj.weight"
FC1 = "vision_tower.encoder.layers.0.mlp.fc1.weight"
ROPE = "text_config.rope_parameters"

CHECKPOINTS: dict[str, Bad] = {
    # files
    "no folder": Bad(shutil.rmtree, CheckpointMissing, ("checkpoint",)),
    "no config": Bad(remove("config.json"), CheckpointMissing, ("config.json",)),
    "config is not JSON": Bad(cut("config.json", 0.5), CheckpointMissing, ("config.json",)),
    "config is a list": Bad(write("config.json", "[1]"), CheckpointMissing, ("config.json",)),
    "no safetensors": Bad(remove("*.safetensors"), CheckpointMissing, ("safetensors",)),
    "one of several is missing": Bad(
        remove("model-00002*"), CheckpointMissing, ("model-00002-of-",), case="clip-llama-v4"),
    "truncated data": Bad(cut("*.safetensors", 0.9), CheckpointMissing, ("model.safetensors", "truncated")),
    "truncated header": Bad(cut("*.safetensors", 0.002), CheckpointMissing, ("model.safetensors",)),
    "empty file": Bad(cut("*.safetensors", 0), CheckpointMissing, ("model.safetensors",)),
    "not safetensors": Bad(
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        CheckpointMissing, ("model.safetensors",)),
    "no tokenizer": Bad(remove("tokenizer.json"), CheckpointMissing, ("tokenizer.json",)),
    "tokenizer cut": Bad(cut("tokenizer.json", 0.5), CheckpointMissing, ("tokenizer.json",)),
    "no processor": Bad(remove("*processor_config.json"), CheckpointMissing, ("processor_config.json",)),
    # tensors
    "projector missing": Bad(
        without("multi_modal_projector.linear_2.weight"),
        TensorMissing, ("multi_modal_projector.linear_2.weight",)),
    "vision layer missing": Bad(without(FC1), TensorMissing, ("encoder.layers.0.mlp.fc1.weight",)),
    "language layer missing": Bad(without(K_PROJ), TensorMissing, ("layers.1.self_attn.k_proj.weight",)),
    "head missing, not tied": Bad(
        without("language_model.lm_head.weight"), TensorMissing, ("lm_head.weight",)),
    "k_proj too narrow": Bad(
        narrower(K_PROJ), TensorShapeMismatch, (K_PROJ, "[47, 48]", "[48, 48]")),
    "fc1 too narrow": Bad(narrower(FC1), TensorShapeMismatch, (FC1, "[49, 36]", "[50, 36]")),
    "fewer kv heads in config": Bad(
        config("text_config.num_key_value_heads", 2), TensorShapeMismatch, ("k_proj",)),
    "longer vocabulary in config": Bad(
        config("text_config.vocab_size", 999), TensorShapeMismatch, ("999",)),
    # architectures
    "unknown model_type": Bad(config("model_type", "fuyu"), UnknownArchitecture, ("fuyu", "llava")),
    "no model_type": Bad(config("model_type", ...), VlmEdgeError, ("model_type", "llava")),
    "unknown --arch": Bad(lambda folder: None, UnknownArchitecture, ("florence", "llava"), arch="florence"),
    "--arch is a path": Bad(lambda folder: None, UnknownArchitecture, ("llava",), arch="../llava"),
    "--arch contradicts": Bad(config("model_type", "fuyu"), VlmEdgeError, ("fuyu", "llava"), arch="llava"),
    # keys of config.json that cannot be honoured
    "vision tower": Bad(config("vision_config.model_type", "beit"), UnsupportedConfig, ("beit", "clip")),
    "language model": Bad(config("text_config.model_type", "rwkv"), UnsupportedConfig, ("rwkv", "llama")),
    "vision hidden_act": Bad(
        config("vision_config.hidden_act", "mish"), UnsupportedConfig, ("vision_config.hidden_act", "mish")),
    "text hidden_act": Bad(
        config("text_config.hidden_act", "xielu"), UnsupportedConfig, ("text_config.hidden_act", "xielu")),
    "projector_hidden_act": Bad(
        config("projector_hidden_act", "mish"), UnsupportedConfig, ("projector_hidden_act", "mish")),
    "rope type": Bad(
        config(ROPE, {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": [2]}),
        UnsupportedConfig, ("longrope",)),
    "rope without factor": Bad(
        config(ROPE, {"rope_type": "linear", "rope_theta": 1e4}), UnsupportedConfig, ("factor",)),
    "rope key": Bad(config(f"{ROPE}.mrope_section", [2, 2, 2]), UnsupportedConfig, ("mrope_section",)),
    "partial rotation": Bad(
        config(f"{ROPE}.partial_rotary_factor", 0.5), UnsupportedConfig, ("partial_rotary_factor",)),
    "qk_norm": Bad(config("text_config.qk_norm", True), UnsupportedConfig, ("text_config.qk_norm",)),
    "unknown vision key": Bad(
        config("vision_config.num_register_tokens", 4), UnsupportedConfig, ("num_register_tokens",)),
    "unknown top key": Bad(
        config("spatial_merge_size", 2), UnsupportedConfig, ("spatial_merge_size",)),
    "normed hidden states": Bad(
        config("vision_config.tie_last_hidden_states", True), UnsupportedConfig,
        ("tie_last_hidden_states",), case="siglip-qwen2"),
    "quantized already": Bad(
        config("quantization_config", {"quant_method": "awq", "bits": 4}), UnsupportedConfig, ("awq",)),
    "feature layer": Bad(config("vision_feature_layer", 9), UnsupportedConfig, ("vision_feature_layer",)),
    "feature layer too negative": Bad(
        config("vision_feature_layer", [-2, -5]), UnsupportedConfig, ("vision_feature_layer",)),
    "select strategy": Bad(
        config("vision_feature_select_strategy", "cls"), UnsupportedConfig,
        ("vision_feature_select_strategy", "cls")),
    "layer types": Bad(
        config("text_config.layer_types", ["full_attention", "chunked_attention"]),
        UnsupportedConfig, ("layer_types",), case="siglip-qwen2"),
    "heads do not divide": Bad(
        config("text_config.num_key_value_heads", 3), UnsupportedConfig, ("num_key_value_heads",)),
    "a size that is a word": Bad(
        config("text_config.num_hidden_layers", "two"), UnsupportedConfig, ("num_hidden_layers",)),
    "no layers": Bad(
        config("text_config.num_hidden_layers", 0), UnsupportedConfig, ("num_hidden_layers",)),
    "another image token": Bad(
        config("image_token_index", 313), VlmEdgeError, ("image_token",)),
    "image size differs": Bad(
        config("image_processor.crop_size", {"height": 40, "width": 40}, "processor_config.json"),
        VlmEdgeError, ("40",)),
    "processor's patch size differs": Bad(
        config("patch_size", 15, "processor_config.json"),
        VlmEdgeError, ("4 = 4 + 1 - 1 places", "9 features")),
    "processor's unknown key": Bad(
        config("image_processor.do_tile", True, "processor_config.json"), UnsupportedConfig, ("do_tile",)),
}  # fmt: skip


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("bad", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(
    bad: Bad, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    from vlm_edge.export.pipeline import export

    source = shutil.copytree(checkpoint(bad.case), tmp_path / "in" / "checkpoint")
    bad.damage(source)
    (tmp_path / "out").mkdir()
    with pytest.raises(bad.error) as caught:
        export(source, tmp_path / "out" / "bundle", arch=bad.arch)
    message = one_sentence(caught.value)
    for word in bad.words:
        assert word in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_is_no_bundle_is_left_alone(
    kind: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    from vlm_edge.export.pipeline import export

    output = tmp_path / "precious"
    if kind == "folder":
        output.mkdir()
    precious = output if kind == "file" else output / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(BundleExists) as caught:
        export(checkpoint("clip-llama"), output)
    assert str(output) in one_sentence(caught.value)
    assert precious.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_older_bundle_is_replaced_whole(
    tmp_path: Path, bundle: Callable[..., Path], checkpoint: Callable[[str], Path]
) -> None:
    from vlm_edge.export.pipeline import export

    output = shutil.copytree(bundle("clip-llama"), tmp_path / "bundle")
    (output / "left-over.bin").write_bytes(b"x")
    export(checkpoint("siglip-qwen2"), output)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    manifest = json.loads((output / "manifest.json").read_text())
    assert names == {*manifest["files"], "manifest.json"}
    assert manifest["source"]["name"] == "siglip-qwen2"


def flip(pattern: str) -> Damage:
    """Change one byte in the middle of every file that matches."""

    def damage(folder: Path) -> None:
        paths = [path for path in folder.rglob(pattern) if path.is_file()]
        assert paths, f"no {pattern} in the bundle: the test would prove nothing"
        for path in paths:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    return damage


def manifest(key: str, value: Any) -> Damage:
    return lambda folder: edit_json(folder / "manifest.json", key, value)


def every(change: Callable[[Path], object], suffix: str) -> Damage:
    def damage(folder: Path) -> None:
        paths = [path for path in folder.rglob("*") if path.name.endswith(suffix)]
        assert paths, f"no *{suffix} in the bundle: the test would prove nothing"
        for path in paths:
            change(path)

    return damage


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BUNDLES: dict[str, Bad] = {
    "no manifest": Bad(remove("manifest.json"), BundleMissing, ("manifest.json",)),
    "no folder": Bad(shutil.rmtree, BundleMissing, ("bundle",)),
    "manifest is not JSON": Bad(cut("manifest.json", 0.5), BundleDamaged, ("manifest.json",)),
    "manifest is a list": Bad(write("manifest.json", "[]"), BundleFormatMismatch, ("None", "3")),
    "another format": Bad(manifest("format", 99), BundleFormatMismatch, ("99", "3")),
    "unknown key": Bad(manifest("colour", "red"), BundleDamaged, ("colour",)),
    "unknown inner key": Bad(manifest("decoder.experts", 8), BundleDamaged, ("experts",)),
    "missing key": Bad(manifest("decoder.kv_heads", ...), BundleDamaged, ("kv_heads",)),
    "mistyped key": Bad(manifest("decoder.layers", "two"), BundleDamaged, ("layers",)),
    "flipped weights": Bad(flip("*.data"), BundleDamaged, (".data",)),
    "flipped graph": Bad(flip("*.onnx"), BundleDamaged, (".onnx",)),
    "flipped tokenizer": Bad(flip("tokenizer.json"), BundleDamaged, ("tokenizer.json",)),
    "flipped embeddings": Bad(flip("embeddings*"), BundleDamaged, ("embeddings",)),
    "half the weights": Bad(every(halve, ".data"), BundleDamaged, (".data",)),
    "weights missing": Bad(every(Path.unlink, ".data"), BundleDamaged, (".data",)),
    "graphs missing": Bad(every(Path.unlink, ".onnx"), BundleDamaged, (".onnx",)),
    "tokenizer missing": Bad(remove("tokenizer.json"), BundleDamaged, ("tokenizer.json",)),
}  # fmt: skip


@pytest.mark.parametrize("bad", BUNDLES.values(), ids=BUNDLES)
def test_a_damaged_bundle_is_refused(bad: Bad, tmp_path: Path, bundle: Callable[..., Path]) -> None:
    folder = shutil.copytree(bundle("clip-llama"), tmp_path / "bundle")
    bad.damage(folder)
    with pytest.raises(bad.error) as caught:
        VLM.load(folder, device="cpu")
    message = one_sentence(caught.value)
    for word in bad.words:
        assert word in message
