"""Bundles and transformers in turn on one device: medians, ratios, and how near the limits they come."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_edge.benchmarks.gpu_limits import Work, work
from vlm_edge.benchmarks.latency import Settings
from vlm_edge.errors import VlmEdgeError
from vlm_edge.runtime.manifest import read_manifest

WARMUP = 2
TIMES = ("image_ms", "prefill_ms", "first_ms", "ttft_ms")  # a smaller one is better
RATE = "decode_tokens_per_s"
COMPARED = 32  # greedy tokens


class SubjectFailed(VlmEdgeError, RuntimeError):
    """A measuring process reported an error or died."""


@dataclass(frozen=True)
class Timing:
    """What is asked of every subject.

    Attributes:
        bundles: by precision.
        checkpoint: the folder that transformers reads, None to leave it out.
        limits: `gpu_limits.rates`, as far as they are known.
    """

    bundles: Mapping[str, Path]
    checkpoint: Path | None
    device: str
    prompt_tokens: int | None
    new_tokens: int
    runs: int
    limits: Mapping[str, float]

    def request(self) -> dict[str, Any]:
        """As `worker.Subject` takes it."""
        settings = Settings(
            prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, device=self.device
        )
        return settings.request()

    @property
    def float_bytes(self) -> int:
        """Of a float as the device holds it: every GPU engine computes in float16."""
        return 4 if self.device == "cpu" else 2


class Subject:
    """The parent's end of `gpu_peers.py`."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.samples: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlm_edge.benchmarks.gpu_peers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # -m would import from the current folder
        )
        self._order = order

    def load(self) -> dict[str, Any]:
        return self.ask(**self._order)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            SubjectFailed: with the process's own sentence, or its exit code.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the empty answer says so
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SubjectFailed(f"the process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SubjectFailed(answer["error"])
        return answer

    def run(self, number: int) -> None:
        """One run; those before it are forgotten when it is the first that counts."""
        sample = self.ask(run=number)["sample"]
        if number <= WARMUP:
            self.samples.clear()
        self.samples.append(sample)

    def close(self) -> None:
        """End the process, and give its memory on the device back."""
        self._process.kill()
        self._process.communicate()


def measure(asked: Timing) -> Iterator[dict[str, Any]]:
    """Load subjects in processes of their own, warm up, then run them in turn: A B C A B C ...

    First the bundles alone, then with transformers, then with it compiled too, each from the start: a peer
    that takes too long to compile costs only its own figures. A subject that fails is left out from there
    on and named in "failed".

    Yields:
        After each round what is known: "prompt_tokens", "visual_tokens", "new_tokens", "runs",
        "subjects" (figures by subject), "ratios" (ours over transformers'; above 1 we are quicker),
        "same_tokens" (greedy tokens equal to fp32's before the first other one, of `COMPARED`) and
        "failed".

    Raises:
        SubjectFailed: no bundle runs.
    """
    failed: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[int]] = {}
    running: dict[str, Subject] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for orders in _stages(asked, str(Path(folder) / "request.npz")):
            for name, order in orders.items():
                subject = Subject(order)
                stack.callback(subject.close)
                with _noted(failed, name):
                    facts[name] = subject.load()
                    answers[name] = subject.ask(tokens=COMPARED)["tokens"]
                    running[name] = subject
            if not running:
                raise SubjectFailed("; ".join(f"{name}: {why}" for name, why in failed.items()))
            about = next(iter(facts.values()))
            for number in range(WARMUP + asked.runs):
                for name in [name for name in running if name not in failed]:
                    with _noted(failed, name):
                        running[name].run(number)
                if number < WARMUP:
                    continue
                samples = {
                    name: each.samples for name, each in running.items() if name not in failed
                }
                yield {
                    "prompt_tokens": about["prompt_tokens"],
                    "visual_tokens": about["visual_tokens"],
                    "new_tokens": asked.new_tokens,
                    "runs": number - WARMUP + 1,
                    "subjects": figures(asked, about["prompt_tokens"], samples),
                    "ratios": ratios(samples),
                    "same_tokens": _agreements(answers),
                    "failed": dict(failed),
                }


@contextlib.contextmanager
def _noted(failed: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except SubjectFailed as error:
        failed[name] = str(error)


def _stages(asked: Timing, saved: str) -> list[dict[str, dict[str, Any]]]:
    """First orders by subject; the bundles save the request, one and the same, that transformers reads."""
    request = {"kind": "ours", "request": asked.request(), "save": saved}
    ours = {name: {**request, "source": str(bundle)} for name, bundle in asked.bundles.items()}
    if asked.checkpoint is None:
        return [ours]
    peer = {
        "source": str(asked.checkpoint),
        "request": saved,
        "steps": max(asked.new_tokens, COMPARED),
        "device": asked.device,
    }
    return [ours, *({kind: {"kind": kind, **peer}} for kind in ("eager", "compiled"))]


def _agreements(answers: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """By subject, tokens equal to fp32's before the first other one."""
    if "fp32" not in answers:
        return {}
    found = {}
    for name, tokens in answers.items():
        pairs = zip(tokens, answers["fp32"], strict=True)
        same = [one == other for one, other in pairs]
        found[name] = same.index(False) if False in same else len(same)
    return found


def figures(
    asked: Timing, prompt: int, samples: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """Medians by subject, and what they come to in GB/s and TFLOP/s.

    Bytes and operations are counted from the subject's own graph; transformers has those of fp32. Shares
    are of the limits that are known.
    """
    found = {}
    for name, runs in samples.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        bundle = asked.bundles.get(name) or asked.bundles.get("fp32")
        counted = None if bundle is None else _work(asked, bundle, prompt)
        found[name] = medians | (_reached(medians, counted, asked.limits) if counted else {})
    return found


def _work(asked: Timing, bundle: Path, prompt: int) -> Work | None:
    """None of an encoder-decoder, whose prefill is another engine's."""
    manifest = read_manifest(bundle)
    if manifest.decoder.start_token_id is not None:
        return None
    context = prompt + asked.new_tokens // 2  # the mean over the answer
    graph = bundle / manifest.engines["llm"].graph
    return work(graph, manifest.decoder, prompt, context, asked.float_bytes)


def _reached(
    medians: Mapping[str, float], counted: Work, limits: Mapping[str, float]
) -> dict[str, float]:
    found = {
        "decode_gb_s": counted.step_bytes * medians[RATE] / 1e9,
        "prefill_tflops": counted.prefill_flops / medians["prefill_ms"] / 1e9,
    }
    for key, figure, limit in (
        ("decode_share", "decode_gb_s", "copy_gb_s"),
        ("prefill_share", "prefill_tflops", "fp16_tflops"),
    ):
        if limits.get(limit):
            found[key] = found[figure] / limits[limit]
    return found


def ratios(
    samples: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """By our subject and by peer: medians over rounds of how many times quicker we are."""
    peers = [name for name in ("eager", "compiled") if name in samples]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in samples.keys() - set(peers):
        found[name] = {}
        for peer in peers:
            pairs = list(zip(samples[name], samples[peer], strict=False))
            both = [key for key in (*TIMES, RATE) if key in pairs[0][0] and key in pairs[0][1]]
            found[name][peer] = {
                key: statistics.median(
                    _quicker(key, mine[key], other[key]) for mine, other in pairs
                )
                for key in both
            }
    return found


def _quicker(key: str, mine: float, other: float) -> float:
    return mine / other if key == RATE else other / mine
