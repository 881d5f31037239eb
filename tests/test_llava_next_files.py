"""LLaVA-NeXT's processor and config.json: every spelling read as transformers does, the rest refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import scene
from tiny import build, edit_json
from tiny_next import CASES
from transformers import AutoImageProcessor, LlavaNextImageProcessorPil

from vlm_edge.errors import CheckpointError, TensorMissing, UnsupportedConfig
from vlm_edge.export.archs.llava_next import read_tiling
from vlm_edge.export.config import Config
from vlm_edge.export.pipeline import read_model
from vlm_edge.export.processor import Processor, read_processor
from vlm_edge.export.vision import tower
from vlm_edge.runtime.preprocess import preprocess
from vlm_edge.runtime.tiling import AnyRes, tiler

KIND = {"image_processor_type": "LlavaNextImageProcessor"}
TILE = {
    "size": {"shortest_edge": 30},
    "crop_size": {"height": 30, "width": 30},
    "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60]],
}
# 672 = 3 * 224: a default that only the other default, tiles of 336 pixels, does not divide
PINS = {"image_grid_pinpoints": [[224, 448], [448, 224], [672, 672]]}


def read(folder: Path, **keys: Any) -> Processor:
    (folder / "preprocessor_config.json").write_text(json.dumps(keys))
    return read_processor(folder)


SPELLINGS: list[dict[str, Any]] = [
    {**KIND, **TILE},
    {**KIND, **PINS},
    {"image_processor_type": "LlavaNextImageProcessorFast", **TILE},
    {"image_processor_type": "LlavaNextImageProcessorPil", **TILE},
    {**KIND, **TILE, "size": 30, "crop_size": 30},
    {**KIND, **TILE, "size": {"height": 30, "width": 30}},
    {**KIND, **TILE, "size": {"height": 44, "width": 37}},  # overview and tiles, once more cropped
    {**KIND, **TILE, "size": {"shortest_edge": 41}},
    {**KIND, **TILE, "size": {"shortest_edge": 21}},  # cropped to more than there is
    {**KIND, **TILE, "do_center_crop": False},
    {**KIND, **TILE, "do_center_crop": False, "crop_size": None},
    {**KIND, **TILE, "do_center_crop": None, "crop_size": None, "size": {"height": 30, "width": 30}},
    {**KIND, **TILE, "do_resize": False, "size": {"shortest_edge": 33}},
    {**KIND, **TILE, "do_pad": False},
    {**KIND, **TILE, "aspect_ratio_setting": "anyres", "do_pad": True},
    {**KIND, **TILE, "do_normalize": False, "image_mean": None},
    {**KIND, **TILE, "do_rescale": False},
    *({**KIND, **TILE, "resample": filter_} for filter_ in range(6)),
]  # fmt: skip


@pytest.mark.verifies("llava_next", "pixels")
@pytest.mark.parametrize("keys", SPELLINGS, ids=str)
def test_tiles_are_transformers_own(keys: dict[str, Any], tmp_path: Path) -> None:
    ours = read(tmp_path, **keys)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pins, image = ours.pinpoints, ours.image
    assert pins is not None
    assert theirs.image_grid_pinpoints == [list(size) for size in pins.resolutions]
    side = (image.height, image.width)
    settings = AnyRes("anyres", (3, 3), pins.resolutions, pins.overview, pins.resample, "newline")
    for width, height in [(90, 61), (40, 95), (7, 31), (60, 60), (250, 40)]:
        picture = scene(width, height, 1)
        (expected,) = theirs(picture)["pixel_values"]
        sheets = tiler(settings, side).plan(width, height).sheets
        np.testing.assert_array_equal(preprocess(picture, image, sheets), expected)


def test_defaults_are_transformers_own(tmp_path: Path) -> None:
    """Their resolutions are for tiles of 336 pixels and their tiles have 224, so these must be said."""
    spelled_out, left_out = tmp_path / "a", tmp_path / "b"
    LlavaNextImageProcessorPil(size=336, crop_size=336).save_pretrained(spelled_out)
    left_out.mkdir()
    found = read(left_out, **KIND, size=336, crop_size=336)
    assert found == read_processor(spelled_out)
    assert found.pinpoints is not None
    assert found.pinpoints.resolutions == (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )
    with pytest.raises(
        UnsupportedConfig, match="336 x 672 pixels are not whole tiles of 224 x 224"
    ):
        read(left_out, **KIND)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"image_grid_pinpoints": [[30, 60], [60, 45]]}, "image_grid_pinpoints", "60 x 45 pixels are not"),
    ({"image_grid_pinpoints": []}, "image_grid_pinpoints", "a list of heights and widths"),
    ({"image_grid_pinpoints": None}, "image_grid_pinpoints", "a list of heights and widths"),
    ({"image_grid_pinpoints": [30, 60]}, "image_grid_pinpoints", "a list of heights and widths"),
    ({"image_grid_pinpoints": [[30, 60.0]]}, "image_grid_pinpoints", "a list of heights"),
    ({"image_grid_pinpoints": [[30, 0]]}, "image_grid_pinpoints", "a list of heights and widths"),
    ({"image_grid_pinpoints": "anyres_max_9"}, "image_grid_pinpoints", "a list of heights"),
    ({"aspect_ratio_setting": "pad"}, "aspect_ratio_setting", "known is anyres"),
    ({"crop_size": {"height": 30, "width": 60}}, "crop_size", "become 30 x 60"),
    ({"do_center_crop": False, "size": 60}, "crop_size", "30 x 30 pixels and become 60 x 60"),
    ({"do_center_crop": False, "size": {"height": 30, "width": 40}}, "crop_size", "become 30 x 40"),
    ({"resample": 7}, "resample", "0 to 5"),
    ({"do_resize": False, "resample": None}, "resample", "0 to 5"),
    ({"size": {"longest_edge": 30}}, "size", "shortest_edge, or height and width"),
    ({"use_square_size": True}, "use_square_size", "unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "named", "why"), REFUSED, ids=str)
def test_refusals_name_the_key(keys: dict[str, Any], named: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        read(tmp_path, **KIND, **(TILE | keys))
    assert str(caught.value).startswith(f"config key preprocessor_config.json: {named} = ")
    assert why in str(caught.value)


# llava-hf/llava-v1.6-mistral-7b-hf as transformers 4 wrote it
MISTRAL = {
    "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000, "model_type": "llava_next", "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "intermediate_size": 14336,
        "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768,
        "model_type": "mistral", "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.39.0.dev0",
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
MISTRAL_PICTURES = {
    "aspect_ratio_setting": "anyres", "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_grid_pinpoints": MISTRAL["image_grid_pinpoints"],
    "image_mean": [0.48145466, 0.4578275, 0.40821073], **KIND,
    "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "LlavaNextProcessor",
    "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 336},
}  # fmt: skip


def test_a_published_model(tmp_path: Path) -> None:
    config = Config(MISTRAL)
    found = read(tmp_path, **MISTRAL_PICTURES)
    settings = read_tiling(config, found, tower.read_tower(config, 336, 336))
    assert (settings.grid, settings.overview) == ((24, 24), (336, 336))
    counted = {  # LlavaNextProcessor._get_number_of_features less the class token gives the same sums
        size: tiler(settings, (336, 336)).plan(*size).equation
        for size in [(672, 672), (640, 480), (1000, 300), (3000, 4000)]
    }
    assert counted == {
        (672, 672): "2928 = 576 + 2304 + 48",
        (640, 480): "2340 = 576 + 1728 + 36",
        (1000, 300): "2182 = 576 + 1584 + 22",
        (3000, 4000): "2352 = 576 + 1728 + 48",
    }


Damage = Callable[[Path], object]
INNER = "image_processor."


def config(key: str, value: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", key, value)


def processor(key: str, value: Any) -> Damage:
    return lambda folder: edit_json(folder / "processor_config.json", key, value)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def without_newline(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "newline" not in k}, path)


# case, damage, what the sentence says
CHECKPOINTS: dict[str, tuple[str, Damage, str]] = {
    "other resolutions": (
        "next-clip-mistral", config("image_grid_pinpoints", [[30, 60]]),
        r"image_grid_pinpoints = \[\[30, 60\]\].*the processor's are \[\[30, 60\], \[60, 30\]"),
    "resolutions in another order": (
        "next-clip-mistral",
        config("image_grid_pinpoints", [[60, 30], [30, 60], [60, 60], [90, 30], [30, 90]]),
        "in the same order"),
    "resolutions left out": (
        "next-clip-mistral", config("image_grid_pinpoints", ...), "the processor's are"),
    "class token kept": (
        "next-clip-mistral",
        both(config("vision_feature_select_strategy", "full"),
             processor("vision_feature_select_strategy", "full")),
        "10 features, which are not its 3 rows and 3 columns of patches; CLIP's class token"),
    "a patch dropped": (
        "next-siglip-qwen2",
        both(config("vision_feature_select_strategy", "default"),
             processor("vision_feature_select_strategy", "default")),
        "8 features, which are not its 3 rows"),
    "the processor's strategy": (
        "next-siglip-qwen2", processor("vision_feature_select_strategy", "default"),
        "places for a tile"),
    "patch size": (
        "next-clip-mistral",
        both(processor("patch_size", 15), processor("num_additional_image_tokens", 6)),
        r"processor\.patch_size = 15.*the encoder's patches have 10 pixels"),
    "another processor": (
        "next-clip-mistral",
        both(processor(INNER + "image_processor_type", "CLIPImageProcessor"),
             processor(INNER + "image_grid_pinpoints", ...), processor(INNER + "do_pad", ...)),
        "needs a LlavaNextImageProcessor"),
    "tiles of another size": (
        "next-clip-mistral",
        both(processor(INNER + "size", 60), processor(INNER + "crop_size", 60),
             processor(INNER + "image_grid_pinpoints", [[60, 60]])),
        r"vision_config\.image_size = 30.*the processor makes 60x60 images"),
    "no newline": ("next-clip-mistral", without_newline, "image_newline"),
    "newline switched off": (
        "next-clip-mistral", config("use_image_newline_parameter", False),
        "each row of tokens ends with image_newline"),
    "LLaVA with tiles": (
        "next-clip-mistral",
        both(config("model_type", "llava"), config("image_grid_pinpoints", ...)),
        "LLaVA sees one tile; tiles need config.json's model_type llava_next"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "damage", "says"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_that_cannot_be_honoured(
    case: str, damage: Damage, says: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(checkpoint(case), tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, TensorMissing if case == "no newline" else CheckpointError)


def test_the_model_counts_tiles_by_its_configs_image_size(tmp_path: Path) -> None:
    """DINOv2 takes tiles of any size, LLaVA-NeXT does not."""
    spec = dataclasses.replace(CASES["next-clip-mistral"], vision="dinov2", pinpoints=[[56, 56]],
                               images={"size": 28, "crop_size": 28})  # fmt: skip
    folder = build("next-dinov2", tmp_path / "checkpoint", spec)
    with pytest.raises(UnsupportedConfig, match=r"image_size = 35.*tiles have 28 x 28 pixels"):
        read_model(folder)


@pytest.mark.parametrize("case", ["next-clip-mistral", "next-clip-vicuna-v4", "next-fine-native"])
def test_a_processor_of_before_4_46_says_nothing_of_patches(
    case: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(checkpoint(case), tmp_path / "checkpoint")
    _, expected, _ = read_model(folder)
    for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        edit_json(folder / "processor_config.json", key, ...)
    _, found, _ = read_model(folder)
    assert found.tiling == expected.tiling


def test_both_files_may_leave_the_resolutions_out(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(checkpoint("next-defaults"), tmp_path / "checkpoint")
    _, expected, _ = read_model(folder)
    edit_json(folder / "config.json", "image_grid_pinpoints", ...)
    edit_json(folder / "processor_config.json", INNER + "image_grid_pinpoints", ...)
    _, found, _ = read_model(folder)
    assert found.tiling == expected.tiling
