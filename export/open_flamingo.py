"""OpenFlamingo's three pieces as one checkpoint folder that `vlm export` reads.

OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390) publishes what it trained, `checkpoint.pt`: a resampler,
gated blocks and the token table. CLIP and the language model are checkpoints of their own. Their weights are
linked into the folder, not copied, where the disk allows it.

    python -m vlm_edge.export.open_flamingo CLIP LANGUAGE checkpoint.pt FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tokenizers
from tokenizers import AddedToken

from vlm_edge.errors import CheckpointMissing, ExtraMissing, UnsupportedConfig, VlmEdgeError
from vlm_edge.export import writer
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.config import read_json
from vlm_edge.export.prompt_files import PromptFiles, read_prompt_files
from vlm_edge.export.source import INDEX, resolve

Rule = Literal["immediate", "previous"]  # of `runtime.manifest.MediaRule`
END_OF_CHUNK, IMAGE = "<|endofchunk|>", "<image>"
# Token table and head of the language models it was trained with.
TABLES = {
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "mpt": ("transformer.wte.weight", "lm_head.weight"),
}
TIED = {"mpt": True}  # where the config does not say
OWN = "flamingo"  # what our names of its tensors begin with

WRAPPERS = re.compile(r"module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
# Saved with the language model; they follow from its config.
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")
BLOCK = re.compile(
    r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|[\w.]+\.(\d+)\.gated_cross_attn_layer)\.(.+)"
)
IN_BLOCK = re.compile(
    r"attn_gate|ff_gate|attn\.norm\.(weight|bias)|attn\.to_(q|kv|out)\.weight"
    r"|ff\.0\.(weight|bias)|ff\.[13]\.weight"
)
RESAMPLER = (  # to the names that IDEFICS gives the same things
    (r"latents", "latents"),
    (r"norm\.(weight|bias)", r"layer_norm.\1"),
    (r"layers\.(\d+)\.0\.norm_media\.(weight|bias)", r"blocks.\1.0.context_layer_norm.\2"),
    (r"layers\.(\d+)\.0\.norm_latents\.(weight|bias)", r"blocks.\1.0.latents_layer_norm.\2"),
    (r"layers\.(\d+)\.0\.to_q\.weight", r"blocks.\1.0.q_proj.weight"),
    (r"layers\.(\d+)\.0\.to_kv\.weight", r"blocks.\1.0.to_kv.weight"),
    (r"layers\.(\d+)\.0\.to_out\.weight", r"blocks.\1.0.output_proj.weight"),
    (r"layers\.(\d+)\.1\.0\.(weight|bias)", r"blocks.\1.1.ln.\2"),
    (r"layers\.(\d+)\.1\.1\.weight", r"blocks.\1.1.fc.weight"),
    (r"layers\.(\d+)\.1\.3\.weight", r"blocks.\1.1.c_proj.weight"),
)


def assemble(
    vision: str | Path,
    language: str | Path,
    checkpoint: Path,
    output: Path,
    rule: Rule = "immediate",
) -> Path:
    """Write the folder.

    Args:
        vision: CLIP, a folder or a Hub name.
        language: the language model, likewise: Llama, GPT-NeoX or MPT, in safetensors.
        checkpoint: OpenFlamingo's state dict, or a training checkpoint that holds it.
        output: the folder, which should not exist.
        rule: the pictures a text position attends to; "previous" where the model was trained with
            only_attend_immediate_media=False.

    Raises:
        CheckpointError: a piece is missing, or not what OpenFlamingo needs.
        BundleExists: `output` does.
        ExtraMissing: torch, which reads the state dict, is not installed.
    """
    output = Path(output)
    writer.check_output(output)
    seer, speaker = resolve(vision)[0], resolve(language)[0]
    text = read_json(speaker / "config.json")
    kind = text.get("model_type")
    if kind not in TABLES:
        raise UnsupportedConfig("model_type", kind, f"known are {', '.join(TABLES)}")
    files = read_prompt_files(speaker)
    tensors = _own_names(_state_dict(Path(checkpoint)), kind)
    tied = text.get("tie_word_embeddings")
    tied = TIED.get(kind, False) if tied is None else tied
    if tied:
        tensors.pop("lm_head.weight", None)
    elif "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = _head(speaker, kind, len(tensors["embed_tokens.weight"]))
    with writer.new_folder(output) as folder:
        names = _link(seer, folder, "vision") | _link(speaker, folder, "language")
        names |= _save(folder, tensors)
        (folder / INDEX).write_text(json.dumps({"weight_map": names}, indent=1), encoding="utf-8")
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (seer / name).is_file():
                shutil.copyfile(seer / name, folder / name)
        texts = _texts(files, len(tensors["embed_tokens.weight"]))
        texts["config.json"] = _config(read_json(seer / "config.json"), text, tensors, tied, rule)
        for name, value in texts.items():
            written = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            (folder / name).write_text(written, encoding="utf-8")
    return output


# -- the state dict -----------------------------------------------------------------------------


def _state_dict(path: Path) -> dict[str, Any]:
    """Tensors by name.

    Raises:
        CheckpointMissing: there is no such file, or it holds something else.
    """
    try:
        import torch
    except ImportError as error:
        raise ExtraMissing("verify", "torch", "reading a .pt file") from error
    if not path.is_file():
        raise CheckpointMissing(path, "there is no such file")
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are not
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever unpickling raises
        reason = str(error).strip().splitlines()[0]
        raise CheckpointMissing(path, f"torch cannot load it ({reason})") from error
    if isinstance(found, dict):
        found = found.get("model_state_dict", found)
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise CheckpointMissing(path, "it holds no state dict")
    return found


def _own_names(state: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The trained tensors by our names, keys and values apart.

    Raises:
        UnsupportedConfig: a tensor that OpenFlamingo does not train.
        CheckpointMissing: there is no token table.
    """
    found = dict[str, Any]()
    for stored, tensor in state.items():
        name = WRAPPERS.sub("", stored)
        if BUFFERS.search(name):
            continue
        own = _own_name(name, kind)
        if own is None:
            why = "vlm-edge reads the resampler, the gated blocks and the token table from it"
            raise UnsupportedConfig(stored, list(tensor.shape), why)
        if own.endswith(".to_kv.weight"):
            parent = own.removesuffix("to_kv.weight")
            key, value = ("k_proj", "v_proj") if own.startswith("perceiver") else ("to_k", "to_v")
            for half, part in zip((key, value), tensor.chunk(2), strict=True):
                found[f"{parent}{half}.weight"] = part.clone()  # safetensors refuses shared memory
        else:
            found[own] = tensor
    for needed in ("embed_tokens.weight", "perceiver.latents"):
        if needed not in found:
            raise CheckpointMissing("checkpoint.pt", f"it has no {needed}; is it an OpenFlamingo?")
    return found


def _own_name(name: str, kind: str) -> str | None:
    tables = dict(zip(TABLES[kind], ("embed_tokens.weight", "lm_head.weight"), strict=True))
    if (table := tables.get(name.removeprefix("lang_encoder."))) is not None:
        return table
    block = BLOCK.fullmatch(name)
    if block is not None:
        layer, rest = block[1] or block[2], block[3]
        return f"gated_cross_attn_layers.{layer}.{rest}" if IN_BLOCK.fullmatch(rest) else None
    for pattern, ours in RESAMPLER:
        if found := re.fullmatch(rf"perceiver\.{pattern}", name):
            return f"perceiver.{found.expand(ours)}"
    return None


def _head(language: Path, kind: str, rows: int) -> Any:
    """The language model's own output projection for `rows` tokens. It is not trained, and its rows for the
    added tokens are in no file: zeros."""
    import torch
    from safetensors import safe_open

    for path in Checkpoint(language).files():
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
            name = next((n for n in (TABLES[kind][1], "lm_head.weight") if n in stored), None)
            if name is not None:
                head = file.get_tensor(name)[:rows]
                more = torch.zeros(rows - len(head), head.shape[1], dtype=head.dtype)
                return torch.cat([head, more])
    raise CheckpointMissing(language, f"it has no {TABLES[kind][1]}")


# -- the folder ---------------------------------------------------------------------------------


def _link(source: Path, folder: Path, prefix: str) -> dict[str, str]:
    """A checkpoint's weight files in the folder, and the file of each of their tensors."""
    from safetensors import safe_open

    names = dict[str, str]()
    for path in Checkpoint(source).files():
        name = f"{prefix}-{path.name}"
        try:
            os.link(path.resolve(), folder / name)
        except OSError:  # on another disk
            shutil.copyfile(path, folder / name)
        with safe_open(path, "np") as file:
            names |= dict.fromkeys(file.keys(), name)
    return names


def _save(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    from safetensors.torch import save_file

    named = {f"{OWN}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    path = folder / f"{OWN}.safetensors"
    save_file(named, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private
    return dict.fromkeys(named, path.name)


def _texts(files: PromptFiles, rows: int) -> dict[str, Any]:
    """The tokenizer's files with OpenFlamingo's tokens, and where an answer ends."""
    core = tokenizers.Tokenizer.from_str(files.tokenizer_json)
    special = dict(files.special_tokens)
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (END_OF_CHUNK, IMAGE)]
    )
    if "pad_token" not in special:  # a token of the table, as the package adds one
        core.add_special_tokens([AddedToken("<PAD>", normalized=False, special=True)])
    if core.get_vocab_size() > rows:
        why = f"the tokenizer has {core.get_vocab_size()} tokens; is it this checkpoint's language model?"
        raise UnsupportedConfig("rows of the token table", rows, why)
    return {
        "tokenizer.json": json.loads(core.to_str()),
        "tokenizer_config.json": special,
        "generation_config.json": {
            "eos_token_id": core.token_to_id(END_OF_CHUNK),
            "repetition_penalty": files.repetition_penalty,
        },
    }


def _config(
    vision: dict[str, Any], text: dict[str, Any], tensors: dict[str, Any], tied: bool, rule: str
) -> dict[str, Any]:
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("gated_cross_attn")}
    depth = len({name.split(".")[2] for name in tensors if name.startswith("perceiver.blocks.")})
    rows = len(tensors["embed_tokens.weight"])
    return {
        "model_type": "open_flamingo",
        "vision_config": vision.get("vision_config", vision),
        "vision_feature_layer": -1,
        "text_config": {**text, "vocab_size": rows, "tie_word_embeddings": tied},
        "cross_attention_layers": sorted(layers),
        "only_attend_immediate_media": rule == "immediate",
        "resampler_depth": depth,
        "resampler_n_latents": len(tensors["perceiver.latents"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_edge.export.open_flamingo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("vision", help="CLIP: folder or Hub name")
    parser.add_argument("language", help="language model: folder or Hub name")
    parser.add_argument("checkpoint", type=Path, help="OpenFlamingo's checkpoint.pt")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--attend", choices=get_args(Rule), default="immediate",
        help="pictures a text attends to: the last one before it, or all previous ones",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        assemble(given.vision, given.language, given.checkpoint, given.output, given.attend)
    except VlmEdgeError as error:
        raise SystemExit(str(error)) from error
    sys.stdout.write(f"{given.output}: vlm export reads it\n")


if __name__ == "__main__":
    main()
