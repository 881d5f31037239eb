"""The checkpoint's image processor, read from its JSON files as settings; no transformers needed.

transformers 4 writes preprocessor_config.json, transformers 5 nests the same keys under
"image_processor" in processor_config.json, which then wins
(`ImageProcessingMixin.get_image_processor_dict`). A key left out has its type's own default; a key
that is null is null, and a null step is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from vlm_edge.errors import CheckpointMissing, UnsupportedConfig
from vlm_edge.export import processor_mllama, processor_split
from vlm_edge.export.processor_split import SplitSettings
from vlm_edge.runtime.manifest import ImageSettings, Resize
from vlm_edge.runtime.tiling.settings import Resample, Size

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"

# PIL.Image.Resampling, by number
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

# Resolutions (height, width) of LLaVA-NeXT where neither its processor nor its config says any.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# Class attributes of transformers' models/*/image_processing_pil_*.py; equal to 4.x's __init__.
_BASE: dict[str, Any] = {
    "do_resize": True,
    "default_to_square": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}}
_CLIP = _BASE | {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": _CLIP | {"image_grid_pinpoints": PINPOINTS},
    "BitImageProcessor": _CLIP,
    "SiglipImageProcessor": _BASE | _HALF | {"default_to_square": False, "resample": 3},
    "BlipImageProcessor": _BASE
    | {
        "size": {"height": 384, "width": 384},
        "resample": 3,
        "image_mean": _CLIP["image_mean"],
        "image_std": _CLIP["image_std"],
    },
    "IdeficsImageProcessor": _BASE
    | {
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": _CLIP["image_mean"],
        "image_std": _CLIP["image_std"],
    },
    "ViTImageProcessor": _BASE | _HALF | {"resample": 2},
    **dict.fromkeys(processor_split.KINDS, processor_split.DEFAULTS),
    processor_mllama.KIND: processor_mllama.DEFAULTS,
}
_STEPS = set(_CLIP) | {"do_pad", "do_convert_rgb"}
# Keys of one type alone.
_OWN = {
    "LlavaNextImageProcessor": {"image_grid_pinpoints", "aspect_ratio_setting"},
    "IdeficsImageProcessor": {"image_size", "image_num_channels"},
    processor_mllama.KIND: {"max_image_tiles"},
}
# The types above never look at these; the rest of them say who wrote the file.
_IGNORED = {
    "data_format", "device", "disable_grouping", "image_seq_length", "input_data_format",
    "pad_size", "return_tensors", "_valid_processor_keys", "_valid_kwargs_names",
    "auto_map", "feature_extractor_type", "image_processor_type", "processor_class",
    "transformers_version",
}  # fmt: skip
_OUTER = {
    "auto_map", "chat_template", "image_processor", "image_token", "num_additional_image_tokens",
    "num_query_tokens", "patch_size", "processor_class", "qformer_tokenizer",
    "vision_feature_select_strategy",
}  # fmt: skip
_OUTER_SPLIT = _OUTER | {"image_seq_len", "video_processor"}


@dataclass(frozen=True)
class Pinpoints:
    """How LlavaNextImageProcessor cuts a picture into tiles."""

    resolutions: tuple[Size, ...]  # pixels, whole tiles; in the file's order
    overview: Size  # pixels that the whole picture is scaled to
    resample: Resample


@dataclass(frozen=True)
class Processor:
    """What the processor files say; None where they do not."""

    image: ImageSettings
    pinpoints: Pinpoints | None  # of LLaVA-NeXT
    split: SplitSettings | None  # of Idefics3 and SmolVLM
    image_processor_type: str  # without "Fast" and the like
    image_seq_len: int | None  # places of a tile in the prompt
    patch_size: int | None  # pixels
    num_additional_image_tokens: int | None
    vision_feature_select_strategy: str | None
    image_token: str | None
    processor_class: str | None
    chat_template: str | None  # Jinja source
    num_query_tokens: int | None = None  # places of a picture in the prompt (BLIP-2)
    max_image_tiles: int | None = None  # of Llama 3.2 Vision


@dataclass(frozen=True)
class _Keys:
    """A JSON object whose refusals name the file and the key."""

    where: str
    data: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def refuse(self, key: str, why: str) -> NoReturn:
        raise UnsupportedConfig(f"{self.where}{key}", self.get(key), why)

    def typed(self, key: str, kind: type) -> Any:
        value = self.get(key)
        if value is not None and type(value) is not kind:  # a bool is not an int here
            self.refuse(key, f"it should be of type {kind.__name__}")
        return value

    def flag(self, key: str) -> bool:
        return bool(self.typed(key, bool))

    def only(self, known: set[str]) -> None:
        for key, value in self.data.items():
            if key not in known and value is not None and value is not False:
                self.refuse(key, "this key is unknown")


def read_processor(folder: Path) -> Processor:
    """Read processor_config.json and preprocessor_config.json of a Hugging Face checkpoint folder.

    Raises:
        CheckpointMissing: neither file describes an image processor, or a file is not JSON.
        UnsupportedConfig: a key is unknown, mistyped, or asks for what the runtime does not do.
    """
    outer = _Keys(f"{PROCESSOR}: ", _read_json(folder / PROCESSOR) or {})
    nested = outer.get("image_processor")
    if nested is not None:
        if not isinstance(nested, dict):
            outer.refuse("image_processor", "it should be an object")
        inner = _Keys(f"{outer.where}image_processor.", nested)
    else:
        found = _read_json(folder / PREPROCESSOR)
        if found is None:
            what = f"no {PREPROCESSOR}, and no image_processor in {PROCESSOR}"
            raise CheckpointMissing(folder, what)
        inner = _Keys(f"{PREPROCESSOR}: ", found)
    one_tile, split = _split(inner)
    image, pinpoints = _image_settings(one_tile)
    processor = Processor(
        image=image,
        pinpoints=pinpoints,
        split=split,
        max_image_tiles=_max_image_tiles(inner),
        image_processor_type=_kind(inner),
        image_seq_len=outer.typed("image_seq_len", int),
        patch_size=outer.typed("patch_size", int),
        num_additional_image_tokens=outer.typed("num_additional_image_tokens", int),
        num_query_tokens=outer.typed("num_query_tokens", int),
        vision_feature_select_strategy=outer.typed("vision_feature_select_strategy", str),
        image_token=_token(outer),
        processor_class=outer.typed("processor_class", str) or inner.typed("processor_class", str),
        chat_template=outer.typed("chat_template", str),
    )
    outer.only(_OUTER if split is None else _OUTER_SPLIT)
    return processor


def _token(outer: _Keys) -> str | None:
    """The placeholder: a text, or an AddedToken as Blip2Processor wrote it."""
    value = outer.get("image_token")
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return str(value.get("content"))
    found: str | None = outer.typed("image_token", str)
    return found


def square_output(settings: ImageSettings, where: str = "") -> tuple[int, int]:
    """The (height, width) that the steps give every image, whatever its own size.

    `where` is what a refusal puts before the key: the file's name.

    Raises:
        UnsupportedConfig: they give some images another size; tiles must all be alike.
    """
    resize = settings.resize
    if settings.crop is not None:
        return settings.crop
    if resize is None:
        why = "without a resize or a crop, a tile would have the image's own size"
        raise UnsupportedConfig(f"{where}do_resize", False, why)
    if resize.mode == "shortest_edge" and settings.pad_to_square is None:
        why = "without a crop or padding to a square, a tile's long edge would be the image's"
        raise UnsupportedConfig(f"{where}size", {"shortest_edge": resize.height}, why)
    return resize.height, resize.width


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointMissing(path.parent, f"{path.name} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointMissing(path.parent, f"{path.name} is not a JSON object")
    return data


def _split(given: _Keys) -> tuple[_Keys, SplitSettings | None]:
    """The processor of one tile that is left to read, and how tiles are cut; None for other types."""
    if _kind(given) not in processor_split.KINDS:
        return given, None
    given.only(processor_split.KEYS | _IGNORED)
    split = processor_split.read(_Keys(given.where, processor_split.DEFAULTS | dict(given.data)))
    left = {key: value for key, value in given.data.items() if key in _STEPS | _IGNORED}
    return _Keys(given.where, left | split.one_tile()), split


def _max_image_tiles(given: _Keys) -> int | None:
    if _kind(given) != processor_mllama.KIND:
        return None
    return processor_mllama.read(_Keys(given.where, processor_mllama.DEFAULTS | dict(given.data)))


def _image_settings(given: _Keys) -> tuple[ImageSettings, Pinpoints | None]:
    kind = _kind(given)
    tiled = kind in ("LlavaNextImageProcessor", processor_mllama.KIND)
    given.only(_STEPS | _IGNORED | _OWN.get(kind, set()))
    keys = _Keys(given.where, _DEFAULTS[kind] | dict(given.data))
    if kind == "IdeficsImageProcessor":
        keys = _square(keys)
    if keys.get("do_convert_rgb") is False:  # null, as SigLIP has it, asks for nothing
        keys.refuse("do_convert_rgb", "images are always converted to RGB")
    pad = None
    if keys.flag("do_pad") and not tiled:  # those pad a batch, or a picture's canvas, with tiles
        if kind != "LlavaImageProcessor":
            keys.refuse("do_pad", "only LlavaImageProcessor's padding to a square is known")
        pad = _pad_colour(keys)
    resize = _resize(keys) if keys.flag("do_resize") else None
    if tiled and resize is not None:
        resize = replace(
            resize, mode="exact"
        )  # all that it resizes is square, or is to become `size`
    rescale = keys.flag("do_rescale")
    normalize = keys.flag("do_normalize")
    std = _channels(keys, "image_std") if normalize else None
    if std is not None and 0.0 in std:
        keys.refuse("image_std", "it would divide by zero")
    settings = ImageSettings(
        pad_to_square=pad,
        resize=resize,
        crop=_crop(keys) if keys.flag("do_center_crop") else None,
        rescale_factor=_number(keys, "rescale_factor") if rescale else None,
        mean=_channels(keys, "image_mean") if normalize else None,
        std=std,
        height=0,
        width=0,
    )
    height, width = square_output(settings, keys.where)
    settings = replace(settings, height=height, width=width)
    return settings, _pinpoints(
        keys, (height, width)
    ) if kind == "LlavaNextImageProcessor" else None


def _square(keys: _Keys) -> _Keys:
    """IdeficsImageProcessor's `image_size`, the side of a square, is another name of `size` and wins."""
    if keys.get("image_num_channels") not in (None, 3):
        keys.refuse("image_num_channels", "images have three channels here")
    side = keys.typed("image_size", int)
    if side is None:
        return keys
    if side < 1:
        keys.refuse("image_size", "it should be a number of pixels")
    return _Keys(keys.where, {**keys.data, "size": {"height": side, "width": side}})


def _pinpoints(keys: _Keys, tile: Size) -> Pinpoints:
    """Source: LlavaNextImageProcessor._preprocess and .get_image_patches.

    Args:
        tile: what the processor's last steps make of each tile, pixels.
    """
    if keys.get("aspect_ratio_setting") not in (None, "anyres"):
        keys.refuse("aspect_ratio_setting", "known is anyres")
    size = _resize(keys)
    overview = size.height, size.width
    cut = size.height if keys.get("crop_size") is None else _crop(keys)[0]
    if tile != (cut, cut):
        why = f"tiles are cut as {cut} x {cut} pixels and become {tile[0]} x {tile[1]}; both should be one"
        keys.refuse("crop_size", why)
    given = keys.get("image_grid_pinpoints")
    if not isinstance(given, list) or not given or not all(map(_is_pair, given)):
        keys.refuse("image_grid_pinpoints", "it should be a list of heights and widths in pixels")
    for height, width in given:
        if height % cut or width % cut:
            why = f"{height} x {width} pixels are not whole tiles of {cut} x {cut}"
            keys.refuse("image_grid_pinpoints", why)
    resolutions = tuple((height, width) for height, width in given)
    return Pinpoints(resolutions, overview, size.resample)


def _kind(keys: _Keys) -> str:
    key = "image_processor_type"
    if keys.get(key) is None and keys.get("feature_extractor_type") is not None:
        key = "feature_extractor_type"  # transformers < 4.26
    name = keys.typed(key, str) or ""
    kind = name.replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")  # other backends of the same processor
    if kind not in _DEFAULTS:
        keys.refuse(key, f"known types: {', '.join(sorted(_DEFAULTS))}")
    return kind


def _resize(keys: _Keys) -> Resize:
    resample = keys.typed("resample", int)
    if resample not in range(len(_RESAMPLE)):
        keys.refuse("resample", "it should be one of Pillow's filters, 0 to 5")
    filter_name: Any = _RESAMPLE[resample]
    size = keys.get("size")
    if isinstance(size, int) and not keys.flag("default_to_square"):
        size = {"shortest_edge": size}
    if isinstance(size, dict) and set(size) == {"shortest_edge"} and _pixels(size["shortest_edge"]):
        return Resize("shortest_edge", size["shortest_edge"], size["shortest_edge"], filter_name)
    height, width = _height_width(keys, "size", "it should be shortest_edge, or height and width")
    return Resize("exact", height, width, filter_name)


def _crop(keys: _Keys) -> tuple[int, int]:
    return _height_width(keys, "crop_size", "it should be a height and a width in pixels")


def _height_width(keys: _Keys, key: str, why: str) -> tuple[int, int]:
    value = keys.get(key)
    if isinstance(value, int):
        value = [value, value]
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        value = [value["height"], value["width"]]
    if not _is_pair(value):
        keys.refuse(key, why)
    return value[0], value[1]


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_pixels(v) for v in value)


def _pixels(value: object) -> bool:
    return type(value) is int and value > 0


def _number(keys: _Keys, key: str) -> float:
    value = keys.get(key)
    if type(value) not in (int, float):
        keys.refuse(key, "it should be a number")
    return float(value)


def _channels(keys: _Keys, key: str) -> tuple[float, float, float]:
    value = keys.get(key)
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(type(v) in (int, float) for v in values):
        keys.refuse(key, "it should be a number, or one for each of three channels")
    return float(values[0]), float(values[1]), float(values[2])


def _pad_colour(keys: _Keys) -> tuple[int, int, int]:
    # LlavaImageProcessorPil._preprocess: int(mean * 255), black without a mean
    if not keys.get("image_mean"):
        return 0, 0, 0
    red, green, blue = (int(v * 255) for v in _channels(keys, "image_mean"))
    if not all(0 <= v <= 255 for v in (red, green, blue)):
        keys.refuse("image_mean", "with do_pad it is a colour, between 0 and 1")
    return red, green, blue
