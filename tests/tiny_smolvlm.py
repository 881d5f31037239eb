"""Tiny Idefics3 and SmolVLM checkpoints with random weights, drawn as in tiny.py.

SmolVLMProcessor cannot be made here (it asks for num2words and, for video, for torchvision), so its files
are written as transformers 4.5x wrote them. Its `get_image_prompt_string` and its image processor are line
by line those of Idefics3 (models/smolvlm/modular_smolvlm.py takes them over), which make the references.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tiny import TEXT, draw
from tokens import CHAT_TEMPLATES, tokenizer_of

VISION: dict[str, Any] = dict(
    hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
    image_size=28, patch_size=7, layer_norm_eps=1e-3,
)  # fmt: skip
# In the published config.json, from the training code; transformers never reads them.
TRAINING = {
    "_flash_attn_2_enabled": True, "is_llama_config": True, "neftune_noise_alpha": 0.0,
    "perceiver_config": {"resampler_depth": 6}, "pixel_shuffle_factor": 4, "qk_layer_norms": False,
    "rope_interleaved": False, "use_resampler": False,
}  # fmt: skip


@dataclass(frozen=True)
class TinySmol:
    """One checkpoint: what differs from the sizes above, and how its files are written."""

    family: Literal["idefics3", "smolvlm"] = "idefics3"
    vision_args: dict[str, Any] = field(default_factory=dict)
    text_args: dict[str, Any] = field(default_factory=dict)
    factor: int = 2
    tile: int = 28
    longest: int = 84
    images: dict[str, Any] = field(default_factory=dict)  # of the image processor
    tied: bool = False
    tokenizer: Literal["smolvlm", "smolvlm-bare"] = "smolvlm"
    dtype: str = "float32"
    published: bool = False  # config.json with the keys that the Hub's checkpoints carry along
    salt: int = 0

    @property
    def side(self) -> int:
        """Patches along an edge of a tile."""
        return self.tile // {**VISION, **self.vision_args}["patch_size"]

    @property
    def tile_tokens(self) -> int:
        return (self.side // self.factor) ** 2

    @property
    def image_args(self) -> dict[str, Any]:
        """Settings of the image processor."""
        sizes = {"size": self.longest, "max_image_size": self.tile}
        return {key: {"longest_edge": edge} for key, edge in sizes.items()} | self.images


SMOL_CASES: dict[str, TinySmol] = {
    "idefics3": TinySmol(),
    "idefics3-factor3": TinySmol(  # tiles larger than the trained image, places spelled as text
        vision_args=dict(image_size=25, patch_size=5, num_attention_heads=9),
        text_args=dict(num_attention_heads=6, num_key_value_heads=2), factor=3, tile=31, longest=93,
        tokenizer="smolvlm-bare", images={"resample": 3, "do_pad": False,
                                          "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]},
        dtype="bfloat16"),
    "idefics3-whole": TinySmol(  # never cut into tiles
        text_args=dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=36),
        images={"do_image_splitting": False}, tied=True),
    "smolvlm": TinySmol(  # 25 patches a side: where the reference's positions are not 0, 1, 2 ...
        family="smolvlm", vision_args=dict(image_size=50, patch_size=2), factor=5, tile=50,
        longest=150, text_args=dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=36),
        tied=True, published=True, salt=2),
    "smolvlm-small-tiles": TinySmol(  # smaller than the trained image, 5 along the edge
        family="smolvlm", vision_args=dict(image_size=41, patch_size=4, hidden_act="gelu"),
        text_args=dict(num_attention_heads=6, num_key_value_heads=3), factor=3, tile=24, longest=120,
        tokenizer="smolvlm-bare", dtype="float16", published=True),
}  # fmt: skip


def build_smol(name: str, folder: Path, spec: TinySmol | None = None) -> Path:
    """Write the checkpoint `name` of SMOL_CASES (or `spec`, with the seed of `name`) into `folder`."""
    import torch
    import transformers

    spec = spec or SMOL_CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(spec.tokenizer)
    prefix = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[spec.family]
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={**VISION, **spec.vision_args},
        text_config=dict(
            {**TEXT, "max_position_embeddings": 4096, **spec.text_args},
            model_type="llama",
            vocab_size=len(tokenizer) + 5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=spec.tied,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=spec.factor,
        tie_word_embeddings=spec.tied,
    )
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + spec.salt)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(draw(parameter_name, parameter.shape, generator))
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder)
    if spec.family == "idefics3":
        processor_of(spec).save_pretrained(folder)
    else:
        _save_smolvlm_processor(spec, tokenizer, folder)
    if spec.published:
        _publish(folder / "config.json")
    return folder


def processor_of(spec: TinySmol) -> Any:
    """The Idefics3Processor of a case, for either family: its ids and pixels are SmolVLMProcessor's."""
    import transformers

    return transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessorPil(**spec.image_args),
        tokenizer=tokenizer_of(spec.tokenizer),
        image_seq_len=spec.tile_tokens,
        chat_template=CHAT_TEMPLATES["smolvlm"],
    )


def _save_smolvlm_processor(spec: TinySmol, tokenizer: Any, folder: Path) -> None:
    import transformers

    image = transformers.SmolVLMImageProcessorPil(**spec.image_args).to_dict()
    image |= {
        "processor_class": "SmolVLMProcessor",
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": spec.tile}},
    }
    processor = {"image_seq_len": spec.tile_tokens, "processor_class": "SmolVLMProcessor"}
    for name, content in (("preprocessor", image), ("processor", processor)):
        (folder / f"{name}_config.json").write_text(json.dumps(content, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["smolvlm"])
    tokenizer.save_pretrained(folder)


def _publish(path: Path) -> None:
    """config.json as it lies on the Hub: keys of training code, and a vocabulary told twice."""
    config = json.loads(path.read_text())
    config["text_config"] |= TRAINING
    config["vision_config"] |= {
        "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048},
        "tie_word_embeddings": False, "use_base_siglip": True,
    }  # fmt: skip
    config |= {
        "use_reentrant_checkpointing": False, "vocab_size": config["text_config"]["vocab_size"],
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    }  # fmt: skip
    path.write_text(json.dumps(config, indent=1))
