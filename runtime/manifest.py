"""The bundle's manifest: what the runtime knows of a model, as data (`docs/bundle.md`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_edge.errors import BundleDamaged, BundleFormatMismatch, BundleMissing
from vlm_edge.runtime.schema import SchemaError, from_json, to_json
from vlm_edge.runtime.tiling.settings import Resample, Tiling

FORMAT = 3
NAME = "manifest.json"

Precision = Literal["fp32", "int8", "int4", "w8a8"]  # w8a8: of a language model; others are in int8
CacheDtype = Literal["float32", "int8"]
MediaRule = Literal["immediate", "previous", "mllama"]
_BYTES = {"float32": 4, "int8": 1}
Dimension = int | str  # a symbolic dimension is its name


@dataclass(frozen=True)
class TensorSpec:
    """An engine's input or output: ONNX name, numpy dtype name, shape with symbolic names."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True)
class EngineEntry:
    """One engine: its portable graph, the lowered graphs that share its weights, its interface."""

    precision: Precision
    graph: str
    lowered: dict[str, str]  # engine kind ("cpu") -> graph file; absent means: run the portable one
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hex digest of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from."""

    name: str  # Hub name or folder name; never a path of the machine
    sha256: str  # of config.json and of every safetensors header
    dtype: str


@dataclass(frozen=True)
class Resize:
    """How an image is scaled: `exact` to height x width, `shortest_edge` to that edge (height == width)."""

    mode: Literal["exact", "shortest_edge"]
    height: int
    width: int
    resample: Resample


@dataclass(frozen=True)
class ImageSettings:
    """The checkpoint's image processor as data, in the order it is applied.

    Source: preprocessor_config.json / processor_config.json. A null step is skipped.
    """

    pad_to_square: tuple[int, int, int] | None  # RGB of the padding (LlavaImageProcessor do_pad)
    resize: Resize | None
    crop: tuple[int, int] | None  # centre crop (height, width), zero-padded where smaller
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    height: int  # of a tile the vision engine takes, pixels
    width: int


@dataclass(frozen=True)
class InstructionSettings:
    """The prompt's text as the connector reads it (InstructBLIP). Source: qformer_tokenizer."""

    tokenizer: str  # file name in the bundle
    max_tokens: int  # positions the connector has


@dataclass(frozen=True)
class InterleaveSettings:
    """How texts and pictures in turn become one text (IdeficsProcessor; OpenFlamingo's: their sum)."""

    bos_token: str | None  # in front of all; None: whatever the tokenizer adds
    around_image: str  # before and after each picture, once between two
    end_of_utterance: str | None  # between two texts
    strip: bool = True  # spaces around a text are dropped


@dataclass(frozen=True)
class PromptSettings:
    """How text and images become token ids. Source: tokenizer_config.json, the processor."""

    image_token: str
    image_token_id: int
    chat_template: str | None  # file name in the bundle
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as the chat template sees them
    # Visual tokens of a prompt that has no place for them come before all else (Blip2Processor);
    # where false, such a prompt is refused.
    visual_tokens_first: bool = False
    instruction: InstructionSettings | None = None
    interleave: InterleaveSettings | None = None
    # Where the text has no bos_token, it goes behind the images that come first, and the tokenizer may add
    # another (MllamaProcessor).
    bos_behind_images: bool = False


@dataclass(frozen=True)
class MediaSettings:
    """Cross-attention to pictures (Flamingo): what a picture becomes in each such layer, and who sees it.

    Source: IDEFICS's, OpenFlamingo's and Mllama's masks (`runtime/media.py`).
    """

    layers: int
    kv_heads: int
    head_dim: int
    rule: MediaRule
    end_token_id: int | None  # behind it no picture is seen until the next

    def arrays(self) -> tuple[TensorSpec, ...]:
        """Keys and values of a picture, tile by tile, as the engine media_kv gives them."""
        shape = ("tiles", self.kv_heads, "tokens", self.head_dim)
        return tuple(
            TensorSpec(f"media.{kind}.{layer}", "float32", shape)
            for layer in range(self.layers)
            for kind in ("key", "value")
        )


@dataclass(frozen=True)
class DecoderSettings:
    """Sizes of the language model's cache and its limits. Source: text_config.

    An encoder-decoder (T5) keeps, besides, the keys and values of its encoder's output, which its engine
    `llm_encoder` computes once for each prompt.
    """

    layers: int
    kv_heads: int
    head_dim: int
    width: int  # of inputs_embeds
    vocab_size: int
    max_positions: int | None  # None: positions are relative and without a bound
    sliding_window: int | None  # keys a query may see, itself included
    chunked_prefill: bool  # false where rotations depend on the whole call (dynamic RoPE)
    cache_dtype: CacheDtype = "float32"  # int8: with one float32 scale for each position and head
    start_token_id: int | None = None  # what an encoder-decoder's answer begins with; else None
    media: MediaSettings | None = None  # of a language model that attends to pictures

    def cache(self) -> tuple[TensorSpec, ...]:
        """The cache's arrays; a graph reads each as `past.<name>` and writes `present.<name>`."""
        return tuple(
            TensorSpec(f"{name}.{layer}", dtype, ("batch", self.kv_heads, "capacity", width))
            for layer in range(self.layers)
            for name, dtype, width in self._layer_cache()
        )

    def cache_bytes(self) -> int:
        """Bytes that one position takes in all layers."""
        sizes = [self.kv_heads * width * _BYTES[dtype] for _, dtype, width in self._layer_cache()]
        return self.layers * sum(sizes)

    def cross(self) -> tuple[TensorSpec, ...]:
        """An encoder-decoder's keys and values of the prompt, which every step reads."""
        if self.start_token_id is None:
            return ()
        shape = ("batch", self.kv_heads, "source", self.head_dim)
        return tuple(
            TensorSpec(f"cross.{kind}.{layer}", "float32", shape)
            for layer in range(self.layers)
            for kind in ("key", "value")
        )

    def _layer_cache(self) -> list[tuple[str, str, int]]:
        arrays = [(kind, str(self.cache_dtype), self.head_dim) for kind in ("key", "value")]
        if self.cache_dtype == "int8":
            arrays += [(f"{kind}_scale", "float32", 1) for kind in ("key", "value")]
        return arrays


@dataclass(frozen=True)
class GenerationSettings:
    """The checkpoint's own defaults. Source: generation_config.json, then text_config."""

    eos_token_ids: tuple[int, ...]
    repetition_penalty: float


@dataclass(frozen=True)
class EmbeddingSettings:
    """The token table: rows of float, or of int8 with one float scale per block of columns."""

    file: str
    scales: str | None
    block: int | None


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json."""

    format: int
    producer: str
    architecture: str
    source: Source
    engines: dict[str, EngineEntry]
    files: dict[str, FileEntry]
    image: ImageSettings
    tiling: Tiling
    prompt: PromptSettings
    decoder: DecoderSettings
    generation: GenerationSettings
    embeddings: EmbeddingSettings
    calibration: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None

    def exact(self, engine: str) -> bool:
        """Does the engine compute in full precision? A language model's cache is a part of it."""
        cache = self.decoder.cache_dtype if engine == "llm" else "float32"
        return self.engines[engine].precision == "fp32" and cache == "float32"

    def dump(self) -> str:
        return json.dumps(to_json(self), indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `folder/manifest.json`.

    Raises:
        BundleMissing: no manifest there.
        BundleFormatMismatch: another format number.
        BundleDamaged: not JSON, or a key is unknown, missing or mistyped.
    """
    path = folder / NAME
    if not path.is_file():
        raise BundleMissing(folder)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleDamaged(folder, f"{NAME} is not JSON ({error})") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise BundleFormatMismatch(folder, found, FORMAT)
    try:
        return from_json(Manifest, data)
    except SchemaError as error:
        raise BundleDamaged(folder, f"{NAME}: {error}") from error
