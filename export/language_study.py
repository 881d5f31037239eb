"""What each linear layer of a language model adds to the error of its next token, and the time it saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np

from vlm_edge.calibration.sensitivity import KL
from vlm_edge.export import mixed
from vlm_edge.export.layerwise import last_positions
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Observer, Quantizer
from vlm_edge.export.static import Progress
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import DecoderSettings

LARGEST = 1 << 30  # bytes of float32 weights: both forms of every layer are in memory at once
SECONDS = 20  # spent on the errors; a model of 0.1 G parameters has some 150 runs in it
TRIES = 4  # assignments that are written and measured at most
JUDGES = 6  # held-out prompts that assignments are compared on


def linear_layers(part: Part) -> frozenset[str]:
    """Paths of the part's linear layers, without running anything."""
    observer = Observer(lambda op, x: {})
    part.build(observer)
    return frozenset(observer.weights)


def study(
    name: str,
    part: Part,
    settings: DecoderSettings,
    quantizer: Callable[[], Quantizer],
    embeds: Sequence[np.ndarray],
    scratch: Path,
    progress: Progress,
) -> mixed.Study | None:
    """Measure every layer by KL divergence (nats a token), and its time in a decode step.

    Args:
        quantizer: makes the quantizer under study, anew for each graph.
        embeds: inputs_embeds float32 [1, n, width] of held-out prompts.

    Returns:
        None where the model is too large to be in memory in both forms.
    """
    layers = Observer(lambda op, x: {})
    inputs = {value.name for value in part.build(layers).graph.inputs}
    if sum(4 * prod(weight.shape) for weight in layers.weights.values()) > LARGEST:
        return None
    feeds = []
    for embed in embeds[:: max(1, len(embeds) // JUDGES)][:JUDGES]:
        every = prefill_feeds(settings, embed)
        every["logit_positions"] = last_positions(embed.shape[1])
        feeds.append({key: value for key, value in every.items() if key in inputs})
    return mixed.study(
        name, part.build, quantizer, feeds, "logits", KL, scratch, progress,
        rows=1, frugal=False, seconds=SECONDS, for_size=True,
    )  # fmt: skip
