"""EVA ViT-g as BLIP-2 and InstructBLIP have it: features and every layer's output are transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blip_parts import VISION, Family, close, layer_outputs, make, pixels_of, run, write
from safetensors.numpy import load_file, save_file
from tiny import edit_json

from vlm_edge.errors import TensorMissing, TensorShapeMismatch, UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights
from vlm_edge.export.config import Config
from vlm_edge.export.quantizers import Float
from vlm_edge.export.vision import eva
from vlm_edge.export.vision.patches import native_grid

CASES: dict[str, tuple[Family, dict[str, Any]]] = {
    "blip2": ("Blip2", {}),
    "instructblip": ("InstructBlip", {}),
    "one-head": ("Blip2", dict(num_attention_heads=1, num_hidden_layers=1, patch_size=7)),
    "no-bias": ("InstructBlip", dict(qkv_bias=False, num_attention_heads=9, num_hidden_layers=2)),
    "quick-gelu": ("Blip2", dict(hidden_act="quick_gelu", layer_norm_eps=0.5, hidden_size=35,
                                 num_attention_heads=5)),
    "tanh": ("InstructBlip", dict(hidden_act="gelu_pytorch_tanh", intermediate_size=31)),
    # rows of pixels that are in no patch
    "odd-image": ("Blip2", dict(image_size=33, num_hidden_layers=5)),
    "one-patch": ("Blip2", dict(image_size=13, patch_size=13)),
}  # fmt: skip


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(case: str, tiles: int, tmp_path: Path) -> None:
    family, sizes = CASES[case]
    made = make(tmp_path, family, vision=sizes)
    part, depth = made.parts["vision"], {**VISION, **sizes}["num_hidden_layers"]
    pixels = pixels_of(part, tiles)
    expected, theirs = layer_outputs(
        made.model.vision_model.encoder.layers,
        lambda: made.model.vision_model(made.torch(pixels)).last_hidden_state,
    )
    names = tuple(f"vision.layers.{index}.output" for index in range(depth))
    found, *layers = run(
        write(part, tmp_path / "vision.onnx", Float(), names), {"pixel_values": pixels}
    )
    close(found, expected)
    for layer, output in zip(layers, theirs, strict=True):
        close(layer, output)
    assert found.shape == (tiles, *part.interface.outputs[0].shape[1:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(dtype: str, tmp_path: Path) -> None:
    made = make(tmp_path, "Blip2", dtype=dtype)
    pixels = pixels_of(made.parts["vision"], 2)
    (found,) = run(write(made.parts["vision"], tmp_path / "vision.onnx"), {"pixel_values": pixels})
    close(found, made.image_features(pixels).last_hidden_state)


def test_every_part_of_the_fused_bias_counts(tmp_path: Path) -> None:
    """Training leaves the keys' part 0, which the published files have; whatever it is, it is added."""
    made = make(tmp_path, "Blip2")
    name = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    assert np.abs(load_file(tmp_path / "model.safetensors")[name]).min() > 0
    paths = [path for path in made.layers("vision") if ".layers.0.self_attn." in path]
    assert [path.rpartition(".")[2] for path in paths] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "projection",
    ]


@pytest.mark.parametrize("kind", ["Blip2VisionConfig", "InstructBlipVisionConfig"])
def test_what_config_json_leaves_out(kind: str) -> None:
    import transformers

    default = getattr(transformers, kind)()
    for values in ({"model_type": default.model_type}, default.to_dict()):
        found = eva.read(Config(values, "vision_config"))
        assert (found.width, found.hidden, found.layers) == (1408, 6144, 39)
        assert (found.heads, found.patch, found.image) == (16, 14, 224)
        assert (found.epsilon, found.qkv_bias) == (default.layer_norm_eps, True)
        assert (found.height, found.breadth, found.patches) == (224, 224, 256)


def test_keys_of_transformers_4() -> None:
    """vision_config as 4.27 wrote it for the published BLIP-2."""
    old = {
        "_name_or_path": "", "attention_dropout": 0.0, "chunk_size_feed_forward": 0, "dropout": 0.0,
        "hidden_act": "gelu", "initializer_factor": 1.0, "layer_norm_eps": 1e-05,
        "model_type": "blip_2_vision_model", "num_channels": 3, "projection_dim": 512,
        "tie_word_embeddings": True, "torch_dtype": None, "transformers_version": "4.27.0.dev0",
        "use_bfloat16": False,
    }  # fmt: skip
    assert eva.read(Config(old, "vision_config")).epsilon == 1e-5


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (
            "image_size",
            [224, 224],
            "should be a positive integer",
        ),  # transformers 5 fails on it too
        ("patch_size", 0, "should be a positive integer"),
        ("image_size", 13, "at least one patch, 14 pixels"),
        ("num_attention_heads", 7, "should divide 1408"),
        ("num_channels", 1, "three channels"),
        ("hidden_act", "mish", "known are"),
        ("qkv_bias", "yes", "true or false"),
        ("model_type", "clip_vision_model", "known are blip_2_vision_model"),
        ("use_rope", True, "does not know this key"),
    ],
)
def test_what_it_cannot_honour_is_named(key: str, value: Any, why: str) -> None:
    with pytest.raises(UnsupportedConfig, match=rf"vision_config\.{key}.*{why}"):
        eva.read(Config({key: value}, "vision_config"))


def test_tiles_of_another_size_are_refused() -> None:
    """transformers takes them only with interpolate_pos_encoding, which `generate` is not given."""
    settings = eva.read(Config({"image_size": 30, "patch_size": 10}))
    native_grid(settings, "EVA ViT-g")
    with pytest.raises(UnsupportedConfig, match=r"image_size.*30.*40x30 images and EVA ViT-g"):
        native_grid(replace(settings, height=40), "EVA ViT-g")


def test_tensors_are_checked(tmp_path: Path) -> None:
    make(tmp_path, "Blip2")
    edit_json(tmp_path / "config.json", "vision_config.image_size", 40)
    with pytest.raises(TensorShapeMismatch, match=r"position_embedding.*10.*17"):
        _encoder(tmp_path)
    edit_json(tmp_path / "config.json", "vision_config.image_size", 30)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TensorMissing, match=r"layers\.1\.self_attn\.qkv\.bias"):
        _encoder(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["qkv_bias"]


def _encoder(folder: Path) -> eva.Encoder:
    checkpoint = Checkpoint(folder)
    settings = eva.read(checkpoint.config.sub("vision_config"))
    return eva.Encoder(Weights(checkpoint).sub("vision_model"), settings, Float())
