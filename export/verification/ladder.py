"""The parity ladder, climbed with one prompt: stage by stage, and layer by layer where a stage fails.

token ids -> tiling -> pixels -> vision -> connector [-> media_kv] -> embeddings -> prefill logits -> greedy
tokens.
Every stage is fed what the bundle's own stages before it gave, so the first rung that fails is where the
fault is; tiling is climbed even if token ids fail, since a wrong number of places says why they do.
Stages that hold or follow a quantized engine are measured and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.calibration.divergence import divergence
from vlm_edge.export.verification.layers import engine_layers, llm_layers
from vlm_edge.export.verification.measures import (
    cosine,
    first_difference,
    largest_difference,
    relative_error,
)
from vlm_edge.export.verification.report import Rung
from vlm_edge.runtime.engine import LANGUAGE
from vlm_edge.runtime.prompt import BuiltPrompt
from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits
from vlm_edge.runtime.vlm import VLM

# Both sides compute the pixels in float32, of order 1.
PIXEL_TOLERANCE = 1e-5
# Two float32 implementations of one model differ by 1e-6 to 1e-5 after tens of layers; the smallest
# real mistakes seen (tanh for erf in GELU, another epsilon) by more than 3e-4.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Probe:
    """A prompt to climb with; `limits` bound the tiles of its images."""

    name: str
    text: str
    images: tuple[Path, ...]
    template: bool
    limits: TileLimits = UNLIMITED


def climb(vlm: VLM, reference: Any, probe: Probe, new_tokens: int) -> Iterator[Rung]:
    """Rungs from the bottom up; none above the first that fails."""
    ladder = _Ladder(vlm, reference, probe, new_tokens)
    for stage in (ladder.prompt, ladder.pixels, ladder.vision, ladder.connector, ladder.media_kv,
                  ladder.embeddings, ladder.logits, ladder.tokens):  # fmt: skip
        failed = False
        for rung in stage():
            yield rung
            failed = failed or rung.ok is False
        if failed:
            return


class _Ladder:
    """The stages of one probe; each method compares one and keeps what the next one is fed."""

    def __init__(self, vlm: VLM, reference: Any, probe: Probe, new_tokens: int) -> None:
        self._vlm, self._reference, self._probe = vlm, reference, probe
        self._new_tokens = new_tokens
        self._inputs = reference.inputs(probe.text, probe.images, probe.template)
        self._built: BuiltPrompt = vlm.build_prompt(
            probe.text, probe.images, probe.template, probe.limits
        )
        self._exact = True  # no quantized engine so far

    def prompt(self) -> Iterator[Rung]:
        found, expected = list(self._built.token_ids), self._inputs.token_ids
        yield self._differences("token ids", "differing token ids", found, expected)
        if self._built.pictures:
            yield self._tiling()

    def _tiling(self) -> Rung:
        """Tiles and visual tokens of each picture; the detail has the terms of each, or what differs."""
        plans = [picture.plan for picture in self._built.pictures]
        found = [(plan.tiles, plan.tokens) for plan in plans]
        counts = [len(tiles) for tiles in self._inputs.tiles]
        expected = list(zip(counts, self._inputs.visual_tokens, strict=True))
        wrong, details = 0, []
        for plan, ours, theirs in zip(plans, found, expected, strict=True):
            detail = f"{plan.width}x{plan.height}: {plan.tiles} tile(s), {plan.equation} tokens"
            if ours != theirs:
                wrong += 1
                detail += f" instead of {theirs[0]} tile(s), {theirs[1]} tokens"
            details.append(detail)
        metric = "pictures whose tiles or visual tokens differ"
        return self._rung("tiling", metric, wrong, 0, "; ".join(details))

    def pixels(self) -> Iterator[Rung]:
        self._expected = self._reference.stages(self._inputs)
        if not self._built.pictures:
            return
        self._tiles = [self._vlm.pixels(picture) for picture in self._built.pictures]
        value = largest_difference(np.concatenate(self._tiles), np.concatenate(self._inputs.tiles))
        yield self._rung("pixels", "largest difference", value, PIXEL_TOLERANCE)

    def vision(self) -> Iterator[Rung]:
        if not self._built.pictures:
            return
        runs = [
            feeds
            for picture, tiles in zip(self._built.pictures, self._tiles, strict=True)
            for feeds in picture.plan.vision_inputs(tiles)
        ]
        self._features = [self._vlm.vision.run(feeds)["features"] for feeds in runs]

        def layers() -> dict[str, np.ndarray]:
            found = [engine_layers(self._vlm.bundle, "vision", feeds) for feeds in runs]
            return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

        features = np.concatenate(self._features)
        yield from self._stage("vision", features, self._expected.features, layers)

    def connector(self) -> Iterator[Rung]:
        connector = self._vlm.connector
        if not self._built.pictures:
            return
        features = self._tokens = np.concatenate(self._features)
        if connector is None:
            return
        feeds = {"features": features}
        if self._built.instruction is not None:
            feeds["instruction_ids"] = np.array([self._built.instruction] * len(features), np.int64)
        self._tokens = connector.run(feeds)["image_features"]
        yield from self._stage(
            "connector",
            self._tokens,
            self._expected.image_features,
            lambda: engine_layers(self._vlm.bundle, "connector", feeds),
        )

    def media_kv(self) -> Iterator[Rung]:
        """Keys and values that the language model attends to, one array after another."""
        media = self._vlm.media_kv
        if not self._built.pictures or media is None:
            return
        found, expected = media.run({"image_features": self._tokens}), self._expected.media

        def rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
            return np.concatenate(
                [arrays[name].reshape(-1, arrays[name].shape[-1]) for name in found]
            )

        yield from self._stage("media_kv", rows(found), rows(expected))

    def embeddings(self) -> Iterator[Rung]:
        self._exact = self._exact and self._vlm.manifest.embeddings.scales is None
        self._read = self._vlm.inputs(self._built)
        yield from self._stage("embeddings", self._read.embeds, self._expected.embeddings)

    def logits(self) -> Iterator[Rung]:
        self._vlm.decoder.length = 0
        if self._read.media is not None:
            self._vlm.decoder.attend(self._read.media)
        self._prefilled = self._vlm.decoder.prefill(self._read.embeds).copy()
        expected = self._expected.logits
        yield from self._stage(
            "prefill logits",
            self._prefilled,
            expected,
            lambda: llm_layers(self._vlm.bundle, self._read),
        )
        if not self._exact:
            kl = divergence([(self._prefilled, expected)]).kl
            yield self._rung("prefill logits", "KL divergence, nats", kl, None)

    def tokens(self) -> Iterator[Rung]:
        name = "greedy tokens"
        tokens, expected = self._reference.greedy(self._inputs, self._new_tokens)
        # First along the reference's own answer, so that one early difference does not hide the rest.
        rows = self._vlm.embeddings.rows(np.asarray(tokens[:-1], np.int64))
        logits = [self._prefilled, *(self._vlm.decoder.decode(row).copy() for row in rows)]
        found = np.stack(logits)
        if self._exact:
            error = relative_error(found, expected)
            yield self._rung(name, "relative error of the logits, worst step", error, TOLERANCE)
        else:
            apart = divergence([(found, expected)])
            yield self._rung(name, "top-1 agreement", apart.top1_agreement, None)
            yield self._rung(name, "KL divergence, nats", apart.kl, None)
        answer = self._vlm.generate(
            self._probe.text,
            self._probe.images,
            self._probe.template,
            max_new_tokens=self._new_tokens,
            temperature=0,
            max_tiles=self._probe.limits.max_tiles,
        )
        rung = self._differences(name, "differing tokens", list(answer.token_ids), tokens)
        if self._exact:
            yield rung
        else:
            first = first_difference(answer.token_ids, tokens)
            value = len(tokens) if first is None else first
            yield self._rung(name, "tokens before the first difference", value, None, rung.detail)

    def _stage(
        self,
        name: str,
        found: np.ndarray,
        expected: np.ndarray,
        layers: Callable[[], dict[str, np.ndarray]] | None = None,
    ) -> Iterator[Rung]:
        engines = LANGUAGE if name == "prefill logits" else (name,)
        manifest = self._vlm.manifest
        used = [engine for engine in engines if engine in manifest.engines]
        self._exact = self._exact and all(manifest.exact(engine) for engine in used)
        if not self._exact:
            yield self._rung(name, "cosine", cosine(found, expected), None)
            return
        metric = "relative error, worst row"
        rung = self._rung(name, metric, relative_error(found, expected), TOLERANCE)
        if rung.ok or layers is None:
            yield rung
            return
        outputs = layers()  # none of a connector without layers of its own
        for layer, output in outputs.items():
            error = relative_error(output, self._expected.layers[layer])
            if error > TOLERANCE:
                yield self._rung(name, metric, error, TOLERANCE, layer=layer)
                yield rung
                return
        detail = f"its {len(outputs)} layers agree" if outputs else ""
        yield self._rung(name, metric, rung.value, TOLERANCE, detail)

    def _differences(self, name: str, metric: str, found: list[int], expected: list[int]) -> Rung:
        first = first_difference(found, expected)
        if first is None:
            return self._rung(name, metric, 0, 0)
        count = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(
            len(found) - len(expected)
        )
        return self._rung(
            name,
            metric,
            count,
            0,
            f"position {first} is {_at(found, first)} instead of {_at(expected, first)}",
        )

    def _rung(
        self,
        name: str,
        metric: str,
        value: float,
        tolerance: float | None,
        detail: str = "",
        layer: str | None = None,
    ) -> Rung:
        return Rung(name, self._probe.name, layer, metric, float(value), tolerance, detail)


def _at(tokens: list[int], index: int) -> str:
    return str(tokens[index]) if index < len(tokens) else "missing"
