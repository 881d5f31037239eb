"""The models of the comparison, and their weights in the two forms that exporters read.

`source/` is the language model or vision encoder alone as a Hugging Face checkpoint, for the peers.
`llava/` is the same tensors, byte by byte, in a LLaVA checkpoint whose other parts are tiny, for our
exporter as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from vlm_edge.benchmarks import big_checkpoint
from vlm_edge.benchmarks.peers import tensorfile
from vlm_edge.benchmarks.peers.protocol import Kind
from vlm_edge.benchmarks.peers.tensorfile import TensorFile
from vlm_edge.errors import VlmEdgeError

SEED = 0
TEXT = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday,"
IMAGE_TOKEN_ID = 400  # of the byte-level tokenizer that comes with random weights

TINY_VISION: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TINY_TEXT: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A language model or a vision encoder: its Hugging Face config, and where its weights are from."""

    name: str
    title: str
    kind: Kind
    architecture: str  # transformers' class
    config: dict[str, Any]
    weights: Literal["demo", "random"] = "random"


MODELS = {
    model.name: model
    for model in (
        Model("smollm2", "SmolLM2-135M", "language", "LlamaForCausalLM", {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 64, "hidden_act": "silu", "vocab_size": 49152, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_theta": 100000.0,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        }, "demo"),
        Model("qwen2-0.5b", "Qwen2-0.5B, random weights", "language", "Qwen2ForCausalLM", {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "hidden_act": "silu", "vocab_size": 151936, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 1e6,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        }),
        Model("siglip-b-512", "SigLIP-B/16 at 512 px, random weights", "vision", "SiglipVisionModel", {
            "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": False,
        }),
        Model("clip-l-336", "CLIP ViT-L/14 at 336 px, random weights", "vision", "CLIPVisionModel", {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        }),
    )
}  # fmt: skip


def materialize(model: Model, folder: Path) -> tuple[Path, Path]:
    """The folders `source` and `llava` of a model below `folder`, written on the first call."""
    source, llava = folder / "source", folder / "llava"
    if not llava.exists():  # it comes last
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(source, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            made = Path(name)
            (made / "source").mkdir()
            (made / "llava").mkdir()
            (_language if model.kind == "language" else _vision)(model, made)
            (made / "source").rename(source)
            (made / "llava").rename(llava)
    return source, llava


def _language(model: Model, folder: Path) -> None:
    source, llava = folder / "source", folder / "llava"
    if model.weights == "demo":
        demo = demo_checkpoint()
        file, prefix = TensorFile(demo / "model.safetensors"), "model.language_model."
        image_token_id = _read(demo / "config.json")["image_token_index"]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, source / name)
        shutil.copy(demo / "chat_template.jinja", llava / "chat_template.jinja")
    else:
        names = [n for n in big_checkpoint.language_shapes(model.config) if "lm_head" not in n[0]]
        big_checkpoint.write_weights(folder / "random", names, SEED)
        file, prefix = TensorFile(folder / "random"), "language_model.model."
        image_token_id = IMAGE_TOKEN_ID
        big_checkpoint.write_tokenizer(source, image_token_id)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, llava / name)
    own = [name for name in file.shapes if name.startswith(prefix)]
    tensorfile.write(
        source / "model.safetensors",
        {name.replace(prefix, "model."): (file, name) for name in own},
    )
    _write(source / "config.json", {"architectures": [model.architecture], **model.config})
    width = model.config["hidden_size"]
    rest = [
        *big_checkpoint.vision_shapes(TINY_VISION),
        *big_checkpoint.projector_shapes(TINY_VISION["hidden_size"], width),
    ]
    renamed = {name.replace(prefix, "language_model.model."): (file, name) for name in own}
    _llava(llava, folder / "rest", renamed, rest, TINY_VISION, model.config, image_token_id)


def _vision(model: Model, folder: Path) -> None:
    source, llava = folder / "source", folder / "llava"
    siglip = model.config["model_type"] == "siglip_vision_model"
    shapes = siglip_shapes(model.config) if siglip else big_checkpoint.vision_shapes(model.config)
    big_checkpoint.write_weights(folder / "random", list(shapes), SEED)
    file = TensorFile(folder / "random")
    tensorfile.write(
        source / "model.safetensors",
        {name.removeprefix("vision_tower."): (file, name) for name in file.shapes},
    )
    _write(source / "config.json", {"architectures": [model.architecture], **model.config})
    big_checkpoint.write_tokenizer(llava, IMAGE_TOKEN_ID)
    text = [n for n in big_checkpoint.language_shapes(TINY_TEXT) if "lm_head" not in n[0]]
    rest = [
        *big_checkpoint.projector_shapes(model.config["hidden_size"], TINY_TEXT["hidden_size"]),
        *text,
    ]
    renamed = {name: (file, name) for name in file.shapes}
    _llava(llava, folder / "rest", renamed, rest, model.config, TINY_TEXT, IMAGE_TOKEN_ID)


def _llava(
    folder: Path,
    scratch: Path,
    tensors: dict[str, tuple[TensorFile, str]],
    rest: list[tuple[str, tuple[int, ...]]],
    vision: dict[str, Any],
    text: dict[str, Any],
    image_token_id: int,
) -> None:
    """The LLaVA checkpoint of `tensors` and random tensors of the shapes in `rest`."""
    big_checkpoint.write_weights(scratch, rest, SEED + 1)
    other = TensorFile(scratch)
    every = tensors | {name: (other, name) for name in other.shapes}
    tensorfile.write(folder / "model.safetensors", every)
    siglip = vision["model_type"] == "siglip_vision_model"
    strategy = "full" if siglip else "default"  # what takes the class token away
    config = {
        "model_type": "llava", "image_token_index": image_token_id,
        "vision_feature_layer": -1,  # the last, so that every layer is measured
        "vision_feature_select_strategy": strategy, "vision_config": vision, "text_config": text,
        "tie_word_embeddings": True,
    }  # fmt: skip
    size = vision["image_size"]
    square = {"height": size, "width": size}
    image: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": square}
    if not siglip:
        image = {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size},
            "crop_size": square,
        }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<image>",
        "patch_size": vision["patch_size"], "num_additional_image_tokens": 0 if siglip else 1,
        "vision_feature_select_strategy": strategy,
    }  # fmt: skip
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", image)
    _write(folder / "processor_config.json", processor)


def siglip_shapes(config: dict[str, Any]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of SigLIP's tensors: CLIP's with a bias on the patches and no class token."""
    width, patch = config["hidden_size"], config["patch_size"]
    root = "vision_tower.vision_model"
    for name, shape in big_checkpoint.vision_shapes(config):
        if "class_embedding" in name or "pre_layrnorm" in name:
            continue
        if name.endswith("position_embedding.weight"):
            yield name, ((config["image_size"] // patch) ** 2, width)
        else:
            yield name, shape
    yield f"{root}.embeddings.patch_embedding.bias", (width,)


def demo_checkpoint() -> Path:
    """The folder of the built-in demo model, assembled where that has not been done.

    Raises:
        VlmEdgeError: the packages that carry its parts are not installed; the sentence names them.
    """
    code = "from vlm_edge.export.demo import assemble; print(assemble())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise VlmEdgeError(done.stderr.strip().splitlines()[-1].partition(": ")[2])
    return Path(done.stdout.strip())


def prompt(model: Model, length: int, seed: int) -> list[int]:
    """Random token ids, no special ones; every seed from -1 up gives another prompt."""
    random = np.random.default_rng([SEED, 1 + seed])
    return [int(token) for token in random.integers(20, model.config["vocab_size"], length)]


def question(model: Model, source: Path, length: int) -> list[int]:
    """Token ids that every peer continues, so that answers can be compared: text for real weights."""
    if model.weights == "random":
        return prompt(model, length, -1)
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    return [int(token) for token in ids[:length]]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
