"""Tiny BLIP-2 and InstructBLIP checkpoints with random weights, as transformers 5 and 4 wrote them.

Three file layouts: "v5"; "v4" (4.46 and later: an image token in config.json and tokenizer, processor files
apart, text_config with every default that PretrainedConfig had); "old" (before 4.46: no image token
anywhere, the model itself put its queries in front).
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tiny import draw, edit_json
from tokens import CHAT_TEMPLATES, tokenizer_of

Family = Literal["blip2", "instructblip"]
CLASSES: dict[Family, str] = {"blip2": "Blip2", "instructblip": "InstructBlip"}

VISION: dict[str, Any] = dict(
    hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
    image_size=30, patch_size=10, layer_norm_eps=1e-3,
)  # fmt: skip
QFORMER: dict[str, Any] = dict(
    hidden_size=40, intermediate_size=46, num_hidden_layers=3, num_attention_heads=5,
    layer_norm_eps=1e-3, vocab_size=99, max_position_embeddings=90, cross_attention_frequency=2,
)  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "opt": dict(hidden_size=48, ffn_dim=70, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=160),
    "t5": dict(d_model=48, d_kv=10, d_ff=70, num_layers=3, num_decoder_layers=2, num_heads=3,
               relative_attention_num_buckets=12, relative_attention_max_distance=20,
               layer_norm_epsilon=1e-3, decoder_start_token_id=0),
    "llama": dict(hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=640, rms_norm_eps=1e-3),
}  # fmt: skip
TOKENIZERS = {"opt": "pieces", "t5": "pieces-eos", "llama": "pieces"}

# What transformers 4 wrote into every nested config.
PRETRAINED = {
    "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torch_dtype": "float16", "torchscript": False, "transformers_version": "4.27.0.dev0",
    "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


@dataclass(frozen=True)
class TinyBlip:
    """One checkpoint: what differs from the sizes above, and how its files are written."""

    family: Family = "blip2"
    text: Literal["opt", "t5", "llama"] = "opt"
    text_args: dict[str, Any] = field(default_factory=dict)
    vision_args: dict[str, Any] = field(default_factory=dict)
    qformer_args: dict[str, Any] = field(default_factory=dict)
    queries: int = 7
    images: dict[str, Any] = field(default_factory=lambda: {"size": {"height": 30, "width": 30}})
    template: str | None = None  # of tokens.CHAT_TEMPLATES
    dtype: str = "float32"
    layout: Literal["v5", "v4", "old"] = "v5"
    shard: str = "5GB"
    vocab_padding: int = 5
    salt: int = 0


BLIP_CASES: dict[str, TinyBlip] = {
    "blip2-opt": TinyBlip(),
    "blip2-opt-post-norm": TinyBlip(
        text_args=dict(do_layer_norm_before=False, activation_function="gelu"), queries=3,
        qformer_args=dict(cross_attention_frequency=1), layout="v4", shard="60KB"),
    "blip2-opt-projection": TinyBlip(  # as OPT-350m: post-norm, a narrower token table
        text_args=dict(do_layer_norm_before=False, word_embed_proj_dim=20, hidden_size=60,
                       num_attention_heads=5), salt=1),
    "blip2-opt-narrow": TinyBlip(  # pre-norm with a projection, no biases, no affine norms, untied
        text_args=dict(word_embed_proj_dim=32, enable_bias=False, tie_word_embeddings=False,
                       layer_norm_elementwise_affine=False), layout="v4", dtype="float16"),
    "blip2-opt-old": TinyBlip(
        layout="old", dtype="bfloat16", shard="60KB", qformer_args=dict(num_hidden_layers=5),
        vision_args=dict(qkv_bias=False), salt=2),
    "blip2-t5": TinyBlip(text="t5", text_args=dict(feed_forward_proj="gated-gelu",
                                                   tie_word_embeddings=False), salt=1),
    "blip2-t5-plain": TinyBlip(
        text="t5", text_args=dict(num_heads=5, d_kv=8, num_decoder_layers=1), queries=4,
        layout="v4"),
    "blip2-t5-old": TinyBlip(
        text="t5", text_args=dict(feed_forward_proj="gated-gelu", dense_act_fn="gelu",
                                  tie_word_embeddings=False),
        layout="old", dtype="float16", salt=1),
    "blip2-llama": TinyBlip(
        text="llama", template="pieces", images={"size": {"height": 30, "width": 30}, "resample": 2,
                                                "image_mean": [0.4, 0.5, 0.6]},
        text_args=dict(tie_word_embeddings=True), queries=5),
    "instructblip-vicuna": TinyBlip("instructblip", "llama"),
    "instructblip-vicuna-v4": TinyBlip(
        "instructblip", "llama", queries=3, layout="v4", dtype="float16", shard="60KB",
        qformer_args=dict(cross_attention_frequency=3, num_hidden_layers=4), salt=1),
    "instructblip-t5": TinyBlip(
        "instructblip", "t5", text_args=dict(feed_forward_proj="gated-gelu",
                                             tie_word_embeddings=False),
        vision_args=dict(hidden_size=42, num_attention_heads=7)),
    "instructblip-t5-v4": TinyBlip(
        "instructblip", "t5", queries=1, qformer_args=dict(num_hidden_layers=1), layout="v4", salt=1),
    "instructblip-opt": TinyBlip("instructblip", "opt", salt=1),
}  # fmt: skip


def build_blip(name: str, folder: Path, spec: TinyBlip | None = None) -> Path:
    """Write the checkpoint `name` of BLIP_CASES (or `spec`, with the seed of `name`) into `folder`."""
    import torch
    import transformers

    spec = spec or BLIP_CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(TOKENIZERS[spec.text])
    config = config_of(spec, tokenizer)
    model = getattr(transformers, f"{CLASSES[spec.family]}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + spec.salt)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(_draw(parameter_name, parameter.shape, generator))
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder, max_shard_size=spec.shard)
    processor_of(spec, tokenizer).save_pretrained(folder)
    if spec.layout != "v5":
        _as_version_4(folder, spec)
    return folder


def config_of(spec: TinyBlip, tokenizer: Any) -> Any:
    """The Blip2Config or InstructBlipConfig of a case."""
    import transformers

    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {"model_type": spec.text, "vocab_size": len(tokenizer) + spec.vocab_padding, **ids}
    return getattr(transformers, f"{CLASSES[spec.family]}Config")(
        vision_config={**VISION, **spec.vision_args},
        qformer_config={**QFORMER, **spec.qformer_args},
        text_config={**text, **TEXT[spec.text], **spec.text_args},
        num_query_tokens=spec.queries,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def processor_of(spec: TinyBlip, tokenizer: Any) -> Any:
    """The processor of a case, with Pillow's resizing."""
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    more = {"qformer_tokenizer": tokenizer_of("words")} if spec.family == "instructblip" else {}
    processor = getattr(transformers, f"{CLASSES[spec.family]}Processor")(
        BlipImageProcessorPil(**spec.images), tokenizer, **more, num_query_tokens=spec.queries
    )
    if spec.template is not None:
        # BLIP-2's processor puts the image in front by itself: its template has no place for it.
        processor.chat_template = CHAT_TEMPLATES[spec.template].replace("<image>", "")
    return processor


def _draw(name: str, shape: Any, generator: Any) -> Any:
    """As tiny.draw, for T5 with scores of order 1 though they are not scaled."""
    noise = draw(name, shape, generator)
    if name.endswith("shared.weight"):
        return noise * 0.7
    return noise / 3 if name.endswith(("Attention.q.weight",)) else noise


def _as_version_4(folder: Path, spec: TinyBlip) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    for part in ("vision_config", "qformer_config", "text_config"):
        config[part] = PRETRAINED | config[part]
    text = config["text_config"]
    tied = text.get(
        "tie_word_embeddings", spec.text_args.get("tie_word_embeddings", spec.text != "llama")
    )
    text["tie_word_embeddings"] = config["tie_word_embeddings"] = tied
    config["qformer_config"]["position_embedding_type"] = "absolute"
    config |= {"use_decoder_only_language_model": spec.text != "t5", "_commit_hash": None}
    if spec.layout == "old":
        del config["image_token_index"]
        _without_image_token(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _old_processor(folder, spec)


def _old_processor(folder: Path, spec: TinyBlip) -> None:
    path = folder / "processor_config.json"
    processor = json.loads(path.read_text())
    image = processor.pop("image_processor") | {"processor_class": processor["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    token = {"__type": "AddedToken", "content": "<image>", "lstrip": False, "normalized": False,
             "rstrip": False, "single_word": False, "special": True}  # fmt: skip
    path.write_text(json.dumps(processor | {"image_token": token}))
    if spec.layout == "old":
        path.unlink()


def _without_image_token(folder: Path) -> None:
    """The vocabulary as it was before the placeholder was added at its end."""
    path = folder / "tokenizer.json"
    core = json.loads(path.read_text())
    core["added_tokens"] = [t for t in core["added_tokens"] if t["content"] != "<image>"]
    core["model"]["vocab"].pop("<image>", None)
    path.write_text(json.dumps(core))
    edit_json(folder / "tokenizer_config.json", "extra_special_tokens", [])


def modern_twin(folder: Path, into: Path, spec: TinyBlip) -> Path:
    """A checkpoint of the old layout, whose model today's transformers cannot prompt, with the files that
    `Blip2Processor` asks for since: the same weights, and an image token after the vocabulary."""
    shutil.copytree(folder, into)
    tokenizer = tokenizer_of(TOKENIZERS[spec.text])
    processor_of(spec, tokenizer).save_pretrained(into)
    edit_json(into / "config.json", "image_token_index", tokenizer.convert_tokens_to_ids("<image>"))
    return into
