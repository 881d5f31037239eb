"""IDEFICS's files: what config.json leaves out, what older versions wrote, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cache
from pictures import scene
from tiny import edit_json
from tiny_blip2 import PRETRAINED
from tiny_idefics import (
    FIRST,
    IDEFICS_CASES,
    TinyIdefics,
    build_idefics,
    config_of,
    idefics_tokenizer,
)

from vlm_edge.errors import TensorMissing, TensorShapeMismatch, UnsupportedConfig
from vlm_edge.export import archs
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.config import Config
from vlm_edge.export.connectors import perceiver
from vlm_edge.export.language import idefics
from vlm_edge.export.layers.activations import ACTIVATIONS
from vlm_edge.export.model import Model
from vlm_edge.export.processor import read_processor
from vlm_edge.export.prompt_files import read_prompt_files
from vlm_edge.export.quantizers import Float
from vlm_edge.export.vision import idefics_vision
from vlm_edge.runtime.manifest import InterleaveSettings, MediaSettings
from vlm_edge.runtime.preprocess import preprocess

RELU = ACTIVATIONS["relu"]
# idefics-9b-instruct's sizes as transformers 4.33 wrote the keys
PUBLISHED: dict[str, Any] = {
    "additional_vocab_size": 3, "alpha_initializer": "zeros", "alpha_type": "float",
    "alphas_initializer_range": 0.0, "architectures": ["IdeficsForVisionText2Text"],
    "bos_token_id": 1, "cross_layer_interval": 4, "dropout": 0.0, "eos_token_id": 2,
    "freeze_lm_head": False, "freeze_text_layers": False, "freeze_text_module_exceptions": [],
    "freeze_vision_layers": False, "freeze_vision_module_exceptions": [], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 2048, "model_type": "idefics", "num_attention_heads": 32,
    "num_hidden_layers": 32, "pad_token_id": 0,
    "perceiver_config": PRETRAINED | {
        "model_type": "idefics", "qk_layer_norms_perceiver": True, "resampler_depth": 6,
        "resampler_head_dim": 96, "resampler_n_heads": 16, "resampler_n_latents": 64,
        "use_resampler": False},
    "qk_layer_norms": True, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.33.0.dev0", "use_cache": True,
    "use_resampler": True,
    "vision_config": PRETRAINED | {
        "attention_dropout": 0.0, "embed_dim": 1280, "hidden_act": "gelu", "image_size": 224,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 5120,
        "layer_norm_eps": 1e-05, "model_type": "idefics", "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 32, "patch_size": 14,
        "vision_model_name": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "vocab_size": 32000, **FIRST,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("idefics")
    return Cache(lambda case: build_idefics(case, root / case))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to write into."""
    return build_idefics("idefics", tmp_path / "idefics")


def read(folder: Path) -> Model:
    """As the pipeline does, the graphs built once."""
    name, arch = archs.find_for("idefics")
    assert name == "flamingo"
    checkpoint = Checkpoint(folder, arch.RENAMES)
    model: Model = arch.read(checkpoint, read_processor(folder), read_prompt_files(folder))
    for part in model.parts.values():
        part.build(Float())
    return model


# -- config.json ------------------------------------------------------------------------------


def test_published_sizes() -> None:
    config = Config(PUBLISHED)
    vision = idefics_vision.read(config.sub("vision_config"))
    assert (vision.tokens, vision.width, vision.layers) == (257, 1280, (32,))
    assert perceiver.read(config.sub("perceiver_config"), vision.width) == (
        perceiver.ResamplerSettings(64, 1280, 5120, 6, 16, 96, True, RELU)
    )
    assert config.flag("use_resampler", False)
    found = idefics.read(config, vision.width, "int8")
    config.finish()
    text = found.text
    assert (text.width, text.hidden, text.layers, text.heads) == (4096, 11008, 32, 32)
    assert (text.kv_heads, text.head_dim, text.vocab_size) == (32, 128, 32003)
    assert (text.max_positions, text.rope.theta, text.tied) == (2048, 10000.0, False)
    assert (found.every, found.blocks, found.additional, found.alphas) == (4, 8, 3, (1,))
    assert found.qk_norms
    decoder = found.decoder(2)
    assert decoder.before[:6] == (0, None, None, None, 1, None)
    settings = decoder.settings()
    assert settings.media == MediaSettings(8, 32, 128, "immediate", 2)
    assert (settings.layers, settings.cache_dtype) == (32, "int8")


def test_what_config_json_leaves_out() -> None:
    """Nothing said, and everything said as transformers says it: the same."""
    import transformers

    said = transformers.IdeficsConfig(vocab_size=32000).to_dict()
    for values in ({"model_type": "idefics"}, said):
        config = Config(values)
        vision = idefics_vision.read(config.sub("vision_config"))
        encoder = vision.encoder
        assert (encoder.width, encoder.hidden, encoder.layers) == (768, 5120, 32)
        assert (encoder.heads, encoder.patch, encoder.image) == (16, 14, 224)
        assert encoder.epsilon == 1e-5
        resampler = perceiver.read(config.sub("perceiver_config"), 768)
        assert resampler == perceiver.ResamplerSettings(64, 768, 3072, 6, 16, 96, False, RELU)
        found = idefics.read(config, 768)
        assert (found.every, found.additional, found.qk_norms) == (1, 0, False)
        assert (found.text.vocab_size, found.text.epsilon) == (32000, 1e-6)
        assert (found.text.hidden, found.alphas) == (11008, (1,))


def test_the_other_name_of_the_encoders_width_wins() -> None:
    """As IdeficsVisionConfig reads it."""
    import transformers

    for said in ({"embed_dim": 32, "hidden_size": 48}, {"hidden_size": 48}, {"embed_dim": 48}):
        assert transformers.IdeficsVisionConfig(**said).embed_dim == 48
        assert idefics_vision.read(Config(said)).width == 48


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cross_layer_interval", 3, "should divide the 4 layers"),
        ("cross_layer_interval", 0, "positive"),
        ("num_attention_heads", 5, "should divide the hidden size 48"),
        ("alpha_type", "matrix", "float, vector"),
        ("additional_vocab_size", -1, "positive"),
        ("additional_vocab_size", True, "positive"),
        ("hidden_act", "glu", "silu"),
        ("head_dim", 12, "does not know this key"),
        ("num_key_value_heads", 2, "does not know this key"),
        ("quantization_config", {"quant_method": "awq"}, "awq"),
        ("vision_config.model_type", "clip_vision_model", "idefics_vision"),
        ("vision_config.image_size", 40, "does not interpolate"),
        ("vision_config.patch_size", 31, "at least one patch"),
        ("vision_config.num_channels", 4, "three channels"),
        ("vision_config.qkv_bias", True, "does not know this key"),
        ("perceiver_config.resampler_depth", 0, "positive"),
        ("perceiver_config.resampler_width", 3, "does not know this key"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_honoured(key: str, value: Any, said: str, folder: Path) -> None:
    edit_json(folder / "config.json", key, value)
    with pytest.raises(UnsupportedConfig, match=said) as caught:
        read(folder)
    assert key.rpartition(".")[2].split("_")[0] in str(caught.value)


def test_a_layer_without_its_block_fails_in_the_reference_too() -> None:
    import torch
    import transformers

    spec = TinyIdefics(every=3)
    tokenizer = idefics_tokenizer(spec)
    model = transformers.IdeficsForVisionText2Text(config_of(spec, tokenizer))
    with pytest.raises(IndexError):
        model(
            input_ids=torch.tensor([[1, 3]]),
            pixel_values=torch.zeros(1, 1, 3, 30, 30),
            image_attention_mask=torch.zeros(1, 2, 1, dtype=torch.bool),
        )


@pytest.mark.parametrize(
    ("edit", "error", "said"),
    [
        ({"use_resampler": True, "qk_layer_norms": False}, None, ""),
        ({"perceiver_config.qk_layer_norms_perceiver": True}, TensorMissing, r"blocks\.0\.0\.q_layer"),
        ({"additional_vocab_size": 3}, TensorShapeMismatch, "additional_fc"),
        ({"additional_vocab_size": 0}, UnsupportedConfig, "<image>"),
        ({"alpha_type": "vector"}, TensorShapeMismatch, "alpha_cross_attn"),
        ({"cross_layer_interval": 1}, TensorMissing, r"gated_cross_attn_layers\.2"),
        ({"use_resampler": False}, None, ""),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    edit: dict[str, Any], error: Any, said: str, folder: Path
) -> None:
    for key, value in edit.items():
        edit_json(folder / "config.json", key, value)
    if error is None:  # what the file then says can be exported
        assert ("connector" in read(folder).parts) == edit["use_resampler"]
        return
    with pytest.raises(error, match=said):
        read(folder)


# -- the processor ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_pixels_are_those_of_transformers(case: str, made: Callable[[str], Path]) -> None:
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(made(case)).image_processor
    ours = read_processor(made(case)).image
    for width, height in ((61, 37), (34, 58), (19, 23), (1, 1)):
        image = scene(width, height, width)
        expected = np.asarray(theirs([image]))
        assert expected.shape == (1, 3, 30, 30)
        np.testing.assert_array_equal(preprocess(image, ours), expected)


@pytest.mark.parametrize("keys", [
    {}, {"image_size": 28}, {"size": {"height": 28, "width": 28}}, {"size": 28},
    {"image_size": 28, "size": {"height": 35, "width": 35}}, {"image_mean": 0.5, "image_std": 0.2},
    {"image_num_channels": 3, "do_rescale": False}, {"do_normalize": False, "resample": 1},
])  # fmt: skip
def test_processor_keys_are_read_as_transformers_reads_them(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "IdeficsImageProcessor", **keys}))
    ours = read_processor(tmp_path).image
    image = scene(53, 44, 3)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    np.testing.assert_array_equal(preprocess(image, ours), np.asarray(theirs([image])))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image_size", 0, "pixels"),
        ("image_size", "224", "int"),
        ("image_num_channels", 4, "three channels"),
        ("do_pad", True, "padding"),
        ("image_grid_pinpoints", [[1, 2]], "unknown"),
        ("image_processor_type", "CLIPImageProcessor", "unknown"),
    ],
)
def test_processor_keys_that_cannot_be_honoured(
    key: str, value: Any, said: str, folder: Path
) -> None:
    edit_json(folder / "processor_config.json", f"image_processor.{key}", value)
    with pytest.raises(UnsupportedConfig, match=said):
        read(folder)


def test_another_image_processor_is_refused(folder: Path) -> None:
    edit_json(
        folder / "processor_config.json",
        "image_processor",
        {"image_processor_type": "BlipImageProcessor", "size": {"height": 30, "width": 30}},
    )
    with pytest.raises(UnsupportedConfig, match=r"BlipImageProcessor.*IdeficsImageProcessor"):
        read(folder)


# -- the tokenizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_what_the_manifest_says(case: str, made: Callable[[str], Path]) -> None:
    model, tokenizer = read(made(case)), idefics_tokenizer(IDEFICS_CASES[case])
    assert model.prompt.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    around = "<fake_token_around_image>"
    assert model.prompt.interleave == InterleaveSettings("<s>", around, None)
    media = model.decoder.media
    assert media is not None and media.end_token_id == tokenizer.eos_token_id
    assert model.decoder.vocab_size == model.embeddings.shape[0]
    assert model.parts["media_kv"].interface.outputs == media.arrays()
    encoder = model.parts["connector" if "connector" in model.parts else "vision"]
    assert model.tiling.tile_tokens == encoder.interface.outputs[0].shape[1]


def test_a_tokenizer_without_a_beginning_or_a_picture_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", "bos_token", None)
    with pytest.raises(UnsupportedConfig, match="bos_token"):
        read(folder)
    edit_json(folder / "tokenizer_config.json", "bos_token", "<s>")
    edit_json(folder / "tokenizer_config.json", "image_token", "<s>")
    with pytest.raises(UnsupportedConfig, match=r"image_token.*<image>"):
        read(folder)


def test_without_an_end_token_pictures_are_seen_to_the_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", "eos_token", None)
    media = read(folder).decoder.media
    assert media is not None and media.end_token_id is None
