"""`read_processor` on what transformers 4 and 5 write, and on every key that cannot be honoured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import scene
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from vlm_edge.errors import CheckpointMissing, UnsupportedConfig
from vlm_edge.export.processor import Processor, read_processor, square_output
from vlm_edge.runtime.manifest import ImageSettings, Resize
from vlm_edge.runtime.preprocess import preprocess

TYPES = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write(folder: Path, preprocessor: object = None, processor: object = None) -> Path:
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if processor is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def read(folder: Path, **keys: Any) -> Processor:
    return read_processor(write(folder, {"image_processor_type": "CLIPImageProcessor", **keys}))


# llava-hf/llava-1.5-7b-hf as transformers 4 wrote it
LLAVA_4 = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
LLAVA_OUTER = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "processor_class": "LlavaProcessor",
    "vision_feature_select_strategy": "default",
}
LLAVA = Processor(
    image=ImageSettings(
        pad_to_square=None,
        resize=Resize("shortest_edge", 336, 336, "bicubic"),
        crop=(336, 336),
        rescale_factor=1 / 255,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        height=336,
        width=336,
    ),
    pinpoints=None,
    split=None,
    image_processor_type="CLIPImageProcessor",
    image_seq_len=None,
    patch_size=14,
    num_additional_image_tokens=1,
    vision_feature_select_strategy="default",
    image_token="<image>",
    processor_class="LlavaProcessor",
    chat_template=None,
)


def test_transformers_4(tmp_path: Path) -> None:
    assert read_processor(write(tmp_path, LLAVA_4, LLAVA_OUTER)) == LLAVA


def test_transformers_5_nests_the_image_processor_and_that_one_wins(tmp_path: Path) -> None:
    ignored = LLAVA_4 | {"size": 224, "crop_size": 224}
    write(tmp_path, ignored, LLAVA_OUTER | {"image_processor": LLAVA_4})
    assert read_processor(tmp_path) == LLAVA
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_processor(tmp_path) == LLAVA


def test_the_outer_file_may_be_absent_or_carry_the_template(tmp_path: Path) -> None:
    alone = read_processor(write(tmp_path, LLAVA_4))
    assert (alone.image, alone.patch_size, alone.image_token) == (LLAVA.image, None, None)
    assert (alone.processor_class, alone.chat_template) == ("LlavaProcessor", None)
    write(
        tmp_path, processor={"chat_template": "{{ messages }}", "auto_map": {"AutoProcessor": "x"}}
    )
    assert read_processor(tmp_path).chat_template == "{{ messages }}"


# Spellings that people's checkpoints use; every one is also given to transformers' AutoImageProcessor.
SPELLINGS: list[dict[str, Any]] = [
    *({"image_processor_type": kind} for kind in TYPES),
    *({"image_processor_type": f"{kind}Fast"} for kind in TYPES),
    {"image_processor_type": "CLIPImageProcessorPil"},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 60, "crop_size": 50},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 50},
    {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "OtherFeatureExtractor",
    },
    {"image_processor_type": "ViTImageProcessor", "do_center_crop": True, "crop_size": 40},
    {"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": None},
    {"image_processor_type": "SiglipImageProcessor", "size": 50, "default_to_square": True},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 50},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "pad_size": 70},
    {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "image_mean": None,
        "do_normalize": False,
    },
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}},
]
CLIP_SPELLINGS: list[dict[str, Any]] = [
    {"size": 50, "default_to_square": None},
    {"size": 50, "default_to_square": True},
    {"size": [50, 40], "crop_size": [30, 20]},
    {"size": {"height": 50, "width": 40}, "do_center_crop": None},
    {"do_resize": None, "size": None, "resample": None},
    {"do_rescale": False, "rescale_factor": None},
    {"do_normalize": False, "image_mean": None},
    {"rescale_factor": 1, "image_mean": 0.5, "image_std": 2},
    {"resample": 0},
    {"foo": None, "bar": False},  # neither asks for anything
    {
        "data_format": "channels_first",
        "device": None,
        "return_tensors": None,
        "image_seq_length": 576,
    },
    {"_valid_processor_keys": ["images"], "processor_class": "CLIPProcessor"},
]
SPELLINGS += [{"image_processor_type": "CLIPImageProcessor", **keys} for keys in CLIP_SPELLINGS]


@pytest.mark.parametrize("keys", SPELLINGS, ids=str)
def test_reads_as_transformers_does(keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = AutoImageProcessor.from_pretrained(write(tmp_path, keys))
    ours = read_processor(tmp_path).image
    assert square_output(ours) == (ours.height, ours.width)
    for width, height in [(90, 61), (40, 95)]:
        image = scene(width, height, 1)
        assert np.array_equal(preprocess(image, ours), np.asarray(theirs(image)["pixel_values"]))


@pytest.mark.parametrize("kind", TYPES)
def test_defaults_are_transformers_own(kind: str, tmp_path: Path) -> None:
    spelled_out, left_out = tmp_path / "a", tmp_path / "b"
    TYPES[kind]().save_pretrained(spelled_out)
    left_out.mkdir()
    write(left_out, {"image_processor_type": kind})
    assert read_processor(spelled_out) == read_processor(left_out)


def test_the_padding_has_the_colour_of_the_mean(tmp_path: Path) -> None:
    found = read(tmp_path, image_processor_type="LlavaImageProcessor", do_pad=True).image
    assert found.pad_to_square == (122, 116, 104)
    assert (found.resize, found.crop) == (Resize("shortest_edge", 224, 224, "bicubic"), (224, 224))


# keys of preprocessor_config.json -> the key that is named, and a part of the reason
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"image_processor_type": "PixtralImageProcessor"}, "image_processor_type", "known types: Bit"),
    ({"image_processor_type": None}, "image_processor_type", "known types"),
    ({"image_processor_type": 3}, "image_processor_type", "type str"),
    (
        {"image_processor_type": None, "feature_extractor_type": "X"},
        "feature_extractor_type",
        "known",
    ),
    ({"do_pad": True}, "do_pad", "only LlavaImageProcessor"),
    ({"do_convert_rgb": False}, "do_convert_rgb", "always converted"),
    ({"use_square_size": True}, "use_square_size", "unknown"),
    ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints", "unknown"),
    ({"foo": 0}, "foo", "unknown"),
    ({"do_resize": "yes"}, "do_resize", "type bool"),
    ({"do_resize": 1}, "do_resize", "type bool"),
    ({"do_resize": False, "do_center_crop": False}, "do_resize", "the image's own size"),
    ({"do_center_crop": False}, "size", "long edge"),
    ({"image_processor_type": "SiglipImageProcessor", "size": 50}, "size", "long edge"),
    ({"size": {"longest_edge": 224}}, "size", "shortest_edge, or height and width"),
    ({"size": {"shortest_edge": 224, "longest_edge": 400}}, "size", "shortest_edge, or"),
    ({"size": {"max_height": 2, "max_width": 2}}, "size", "shortest_edge, or"),
    ({"size": {"shortest_edge": 0}}, "size", "shortest_edge, or"),
    ({"size": {"height": 224, "width": -1}}, "size", "shortest_edge, or"),
    ({"size": [224]}, "size", "shortest_edge, or"),
    ({"size": 30.0}, "size", "shortest_edge, or"),
    ({"size": True}, "size", "shortest_edge, or"),
    ({"size": None}, "size", "shortest_edge, or"),
    ({"crop_size": None}, "crop_size", "a height and a width"),
    ({"crop_size": {"shortest_edge": 30}}, "crop_size", "a height and a width"),
    ({"crop_size": 0}, "crop_size", "a height and a width"),
    (
        {"image_processor_type": "ViTImageProcessor", "do_center_crop": True},
        "crop_size",
        "a height",
    ),
    ({"resample": 6}, "resample", "0 to 5"),
    ({"resample": None}, "resample", "0 to 5"),
    ({"resample": "bicubic"}, "resample", "type int"),
    ({"rescale_factor": None}, "rescale_factor", "a number"),
    ({"rescale_factor": "1/255"}, "rescale_factor", "a number"),
    ({"image_mean": [0.5]}, "image_mean", "three channels"),
    ({"image_mean": None}, "image_mean", "three channels"),
    ({"image_std": ["a", "b", "c"]}, "image_std", "three channels"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std", "divide by zero"),
    (
        {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
            "image_mean": [128, 128, 128],
        },
        "image_mean",
        "between 0 and 1",
    ),
]


@pytest.mark.parametrize(("keys", "named", "why"), REFUSED, ids=str)
def test_refusals_name_the_key(keys: dict[str, Any], named: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        read(tmp_path, **keys)
    assert str(caught.value).startswith(f"config key preprocessor_config.json: {named} = ")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("outer", "named"),
    [
        ({"image_processor": LLAVA_4 | {"do_pad": True}}, "image_processor.do_pad"),
        ({"image_processor": "CLIPImageProcessor"}, "image_processor"),
        ({"video_processor": {"size": 384}}, "video_processor"),
        ({"patch_size": "14"}, "patch_size"),
        ({"patch_size": True}, "patch_size"),
        ({"image_token": {"content": "<image>"}}, "image_token"),
        ({"chat_template": [{"name": "default", "template": ""}]}, "chat_template"),
    ],
)
def test_refusals_in_the_outer_file(outer: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig, match=f"config key processor_config.json: {named} = "):
        read_processor(write(tmp_path, LLAVA_4, outer))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointMissing, match=r"no preprocessor_config\.json, and no image_processor"
    ):
        read_processor(tmp_path)
    write(tmp_path, processor=LLAVA_OUTER)
    with pytest.raises(CheckpointMissing, match=r"no preprocessor_config\.json"):
        read_processor(tmp_path)
    for text, why in [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("\xff", "is not JSON"),
    ]:
        (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointMissing, match=rf"preprocessor_config\.json {why}"):
            read_processor(tmp_path)
