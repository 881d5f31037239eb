"""llama.cpp through the C API of its Python binding, compiled for this machine."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.benchmarks.peers.protocol import Bits, Generated, Kind, LanguageModel, VisionEncoder
from vlm_edge.benchmarks.peers.tensorfile import TensorFile

TITLE = "llama.cpp"
PACKAGES = ("llama-cpp-python", "gguf")
# No K-quants: they need widths divisible by 256. Its image encoders need a whole LLaVA-type model.
VARIANTS: Mapping[Kind, Mapping[str, Bits]] = {
    "language": {"Q8_0": "int8", "Q4_0": "int4"},
    "vision": {},
}
CAPACITY = 2048  # positions of the context
FILE = "model.gguf"


def prepare(kind: Kind, source: Path, llava: Path, variant: str, target: Path) -> None:
    """Write float32 GGUF, then have llama.cpp's own quantizer make the variant of it."""
    import llama_cpp

    floats = target / "float32.gguf"
    write_gguf(source, floats)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
    status = llama_cpp.llama_model_quantize(
        str(floats).encode(), str(target / FILE).encode(), ctypes.byref(settings)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize ended with status {status}")
    floats.unlink()


def write_gguf(source: Path, path: Path) -> None:
    """A Hugging Face Llama or Qwen2 checkpoint as GGUF without a vocabulary: prompts are token ids."""
    import gguf

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    file = TensorFile(source / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    llama = config["model_type"] == "llama"
    writer: Any = gguf.GGUFWriter(path, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for name in file.shapes:
        values = file.array(name)
        if llama and ".q_proj." in name or llama and ".k_proj." in name:
            values = interleave(values, heads if ".q_proj." in name else kv_heads)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [outputs, inputs] so that rotary embedding pairs neighbours, as GGUF's Llama wants it."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def load_language(target: Path, variant: str, threads: int) -> LanguageModel:
    return Llama(target / FILE, threads)


def load_vision(target: Path, variant: str, threads: int) -> VisionEncoder:
    raise NotImplementedError("VARIANTS has none")


class Llama:
    """A GGUF file in a context of CAPACITY positions."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = CAPACITY
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        begin = time.perf_counter()
        tokens = [self._decode(prompt)]
        middle = time.perf_counter()
        for _ in range(steps):
            tokens.append(self._decode(tokens[-1:]))
        return Generated(middle - begin, time.perf_counter() - middle, tokens)

    def _decode(self, tokens: Sequence[int]) -> int:
        """Append tokens to the cache; the likeliest token after them."""
        limit = 512  # llama.cpp's own n_ubatch; n_batch is no less
        for start in range(0, len(tokens), limit):
            piece = tokens[start : start + limit]
            array = (self._api.llama_token * len(piece))(*piece)
            status = self._api.llama_decode(
                self._context, self._api.llama_batch_get_one(array, len(piece))
            )
            if status:
                raise RuntimeError(f"llama_decode ended with status {status}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab_size,))))
