"""Does a device give the CPU's answers? Greedy tokens one by one, and the logits behind them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm_edge.benchmarks.worker import picture
from vlm_edge.runtime.prompt import BuiltPrompt
from vlm_edge.runtime.vlm import VLM

PROMPTS = ("What color is the shape?", "Describe the image.", "Is there a circle in the picture?")
# Relative error of logits that float16 may add where the reference implementation's own is not known:
# a unit roundoff of 2^-11 at a few places of each of some thirty layers, added up as random errors are.
FLOAT16 = 1e-2
ALLOWED = 2  # times the reference implementation's own float16 error
WORSE = 1.25  # times the CPU's distance to full precision, that a quantized bundle may be away on a device


@dataclass(frozen=True)
class Difference:
    """The first token that differs.

    Attributes:
        case: "picture / prompt".
        index: of the answer's tokens, from 0.
        margin: of the CPU's logits between the two tokens, over its largest magnitude.
    """

    case: str
    index: int
    cpu: int
    device: int
    margin: float


@dataclass(frozen=True)
class Agreement:
    """A device beside the CPU, over all cases, along the CPU's own answers.

    Attributes:
        tokens: compared.
        same: of these, equal.
        first: per case that has one, the first token that differs. Up to it both have read the same
            tokens, so it is where a free greedy answer would leave the CPU's.
        logit_error: the largest over positions of |device - CPU| / |CPU| (Euclidean norms, means taken off).
        largest: the largest difference of a logit, over the largest magnitude at that position.
        kl: mean KL divergence of the next token's distribution, nats.
        embeds_error: relative, of what the language model reads: visual tokens and text.
    """

    tokens: int
    same: int
    first: list[Difference]
    logit_error: float
    largest: float
    kl: float
    embeds_error: float


@dataclass(frozen=True)
class Along:
    """What a model says along an answer: tokens, their logits float32 [n, vocab], what it read."""

    tokens: list[int]
    logits: np.ndarray
    embeds: np.ndarray


def pictures() -> dict[str, bytes]:
    """Drawn pictures by name, of several shapes: PNG or JPEG files."""
    found = {"grain": picture()}
    for name, size, colour, ellipse in (
        ("red circle, wide", (320, 160), "red", True),
        ("blue square, tall", (120, 300), "blue", False),
    ):
        image = Image.new("RGB", size, "white")
        side = min(size)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if ellipse else draw.rectangle
        shape((left + 10, top + 10, left + side - 10, top + side - 10), fill=colour)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found[name] = buffer.getvalue()
    return found


def cases() -> dict[str, tuple[str, bytes]]:
    """Every prompt about every picture, by "picture / prompt"."""
    return {f"{name} / {p}": (p, image) for name, image in pictures().items() for p in PROMPTS}


def build(vlm: VLM, prompt: str, image: bytes) -> BuiltPrompt:
    """The request as the bundle wants it; a model without a template gets the image's place first."""
    asked, template = vlm.manifest.prompt, vlm.template is not None
    if not (template or asked.visual_tokens_first or asked.interleave is not None):
        prompt = f"{asked.image_token}\n{prompt}"
    return vlm.build_prompt(prompt, [image], template)


def along(vlm: VLM, built: BuiltPrompt, tokens: Sequence[int] | None, count: int) -> Along:
    """Logits along `tokens`, or along the model's own greedy answer of `count` tokens."""
    inputs = vlm.inputs(built)
    vlm.decoder.length = 0
    if inputs.media is not None:
        vlm.decoder.attend(inputs.media)
    logits = [vlm.decoder.prefill(inputs.embeds).copy()]
    answer = []
    for index in range(count):
        answer.append(int(logits[-1].argmax()) if tokens is None else tokens[index])
        if index + 1 < count:
            logits.append(vlm.decoder.decode(vlm.embeddings.row(answer[-1])).copy())
    return Along(answer, np.stack(logits), inputs.embeds)


def compare(found: Mapping[str, tuple[Along, Along]]) -> Agreement:
    """Of each case the CPU's and the device's."""
    first, same, tokens = [], 0, 0
    errors, largest, kls, embeds = [], [], [], []
    for case, (cpu, device) in found.items():
        picks = device.logits.argmax(1)
        equal = picks == np.array(cpu.tokens)
        same, tokens = same + int(equal.sum()), tokens + len(equal)
        scale = np.abs(cpu.logits).max(1)
        if not equal.all():
            at = int(np.argmin(equal))
            mine, other = cpu.tokens[at], int(picks[at])
            margin = float((cpu.logits[at, mine] - cpu.logits[at, other]) / scale[at])
            first.append(Difference(case, at, mine, other, margin))
        gap = device.logits - cpu.logits
        errors.append(logit_error(device.logits, cpu.logits))
        largest.append(float((np.abs(gap).max(1) / scale).max()))
        kls.append(_divergence(cpu.logits, device.logits))
        embeds.append(relative(device.embeds[0], cpu.embeds[0]))
    return Agreement(
        tokens, same, first, _worst(errors), _worst(largest), float(np.mean(kls)), _worst(embeds)
    )


def _worst(values: Sequence[float]) -> float:
    return float(np.max(values))  # NaN wherever one is


def logit_error(found: np.ndarray, expected: np.ndarray) -> float:
    """`relative` of logits, each position's mean taken off: what is added to all of them says nothing."""
    return relative(*(each - each.mean(1, keepdims=True) for each in (found, expected)))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |found - expected| / |expected| of a row; NaN wherever one is."""
    norms = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(norms.max())


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    p, q = (_log_softmax(each.astype(np.float64)) for each in (expected, found))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    whole: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return whole


def parity(
    bundles: Mapping[str, Path], device: str, new_tokens: int, tolerance: float = FLOAT16
) -> Iterator[dict[str, Any]]:
    """Each bundle on the device and on the CPU in one process; one more bundle each time.

    Args:
        bundles: by precision; "fp32" comes first where it is.
        tolerance: of the relative error of logits in full precision.

    Yields:
        By precision: an Agreement, "within" (bool), "distance" of the CPU's and the device's first
        logits to full precision's on the CPU (quantized bundles), and "why" where it is not within.
    """
    report: dict[str, Any] = {}
    exact: dict[str, np.ndarray] = {}
    for precision, bundle in bundles.items():
        found = {}
        with ExitStack() as stack:
            cpu = stack.enter_context(VLM.load(bundle, device="cpu"))
            other = stack.enter_context(VLM.load(bundle, device=device))
            for case, (prompt, image) in cases().items():
                expected = along(cpu, build(cpu, prompt, image), None, new_tokens)
                answer = along(other, build(other, prompt, image), expected.tokens, new_tokens)
                found[case] = (expected, answer)
        if precision == "fp32":
            exact = {case: each.logits[:1] for case, (each, _) in found.items()}
        agreement = compare(found)
        distance = {
            name: max(logit_error(found[case][side].logits[:1], exact[case]) for case in exact)
            for side, name in enumerate(("cpu", "device"))
            if exact and precision != "fp32"
        }
        why = verdict(agreement, distance, tolerance)
        report[precision] = asdict(agreement) | {
            "distance": distance,
            "within": not why,
            "why": why,
        }
        yield dict(report)


def verdict(agreement: Agreement, distance: Mapping[str, float], tolerance: float) -> str:
    """What is wrong, in words; nothing where all is well.

    In full precision the logits' error counts, and a token may differ only where the CPU's two logits
    are nearer to each other than rounding. The CPU rounds a quantized model's activations too, so there
    the device has to be as near to full precision as the CPU is.
    """
    if distance:
        allowed = WORSE * distance["cpu"] + tolerance
        if not distance["device"] <= allowed:  # NaN is not
            return f"logits are {distance['device']:.2%} from full precision, the CPU's {distance['cpu']:.2%}"
        return ""
    if not agreement.logit_error <= tolerance:
        return f"logits differ by {agreement.logit_error:.2%}, float16 explains {tolerance:.2%}"
    clear = [each for each in agreement.first if each.margin > 2 * tolerance]
    if clear:
        each = clear[0]
        return f"token {each.index} of {each.case} is {each.device} instead of {each.cpu}"
    return ""
