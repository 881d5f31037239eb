"""Latency, memory and energy of one bundle, or of two in one interleaved run."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_edge.benchmarks import machine
from vlm_edge.benchmarks.power import Meter, metering
from vlm_edge.benchmarks.schema import REPEATED, Figure, Measured, Report, Sample, spread
from vlm_edge.errors import VlmEdgeError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """The request that every run repeats, and how often."""

    image: str | None = None  # None: a drawn picture
    no_image: bool = False
    prompt: str | None = None
    prompt_tokens: int | None = None  # in all, visual tokens included; None: as the prompt is
    new_tokens: int = 64
    max_tiles: int | None = None  # of the picture
    max_visual_tokens: int | None = None
    runs: int = 10
    warmup: int = 2
    threads: int | None = None
    device: str = "cpu"
    plans: Path | None = None  # the folder of TensorRT plans

    def request(self) -> dict[str, Any]:
        """What a worker needs to know."""
        asked = {k: v for k, v in asdict(self).items() if k not in ("runs", "warmup")}
        return asked | {"plans": None if self.plans is None else str(self.plans)}


class WorkerFailed(VlmEdgeError, RuntimeError):
    """The measuring process reported an error or died; the sentence is the one it gave."""


class WorkerTraceback(Exception):
    """The traceback of the measuring process as text: the cause of a WorkerFailed, for --debug."""


class Worker:
    """The parent's end of `worker.py`."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.samples: list[Sample] = []
        self.spans: list[tuple[float, float, float]] = []  # of the samples: begin, first token, end
        self.facts: dict[str, Any] = {}  # filled by `load`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlm_edge.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # -m would import from the current folder
        )

    def load(self, settings: Settings) -> None:
        """Have the bundle loaded and the request built."""
        self.facts = self.ask(bundle=str(self.bundle), **settings.request())

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the empty answer says so
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise WorkerFailed(
                f"the process measuring {self.bundle.name} ended with code {code}; "
                "killed for its memory, if that is -9"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"]) from WorkerTraceback(answer["traceback"])
        return answer

    def run(self, number: int, counts: bool) -> None:
        """One request; `counts` keeps what it gave."""
        answer = self.ask(run=number)
        if counts:
            self.samples.append(answer["sample"])
            self.spans.append(answer["span"])

    def measured(self, meter: Meter, new_tokens: int) -> Measured:
        """What the runs so far gave."""
        for sample, span in zip(self.samples, self.spans, strict=True):
            sample |= energy_figures(meter, span, new_tokens)
        figures: dict[str, Figure] = {
            name: spread(name, [s[name] for s in self.samples if name in s]) for name in REPEATED
        }
        files = (path for path in self.bundle.rglob("*") if path.is_file())
        figures["load_s"] = float(self.facts["load_s"])
        figures["bundle_mb"] = sum(path.stat().st_size for path in files) / 1e6
        figures["peak_rss_mb"] = self.ask(peak=True)["peak_rss_mb"]
        about = {k: self.facts[k] for k in ("architecture", "producer", "precisions")}
        bundle = {"name": self.bundle.resolve().name, **about}
        return Measured(bundle, machine.versions(), figures, self.samples)

    def close(self) -> None:
        """End the process; closing its stdin is the order to."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextmanager
def _workers(bundles: list[Path], settings: Settings) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for bundle in bundles:
            worker = Worker(bundle)
            stack.callback(worker.close)
            worker.load(settings)
            started.append(worker)
        yield started


def measure(
    bundle: Path,
    settings: Settings,
    against: Path | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Report:
    """Load each bundle in a process of its own, warm up, then run them in turn: A B A B ...

    Raises:
        WorkerFailed: a bundle does not load or run; the sentence is the worker's.
    """
    bundles = [bundle] if against is None else [bundle, against]
    rounds = settings.warmup + settings.runs
    progress("load", 0, len(bundles))
    with metering(settings.device) as meter, _workers(bundles, settings) as workers:
        progress("load", len(bundles), len(bundles))
        before = machine.board()
        for number in range(rounds):
            warming = number < settings.warmup
            step, total = ("warm-up", settings.warmup) if warming else ("runs", settings.runs)
            done = number if warming else number - settings.warmup
            progress(step, done, total)
            for worker in workers:
                worker.run(number, counts=not warming)
            progress(step, done + 1, total)
        meter.settle()
        throttling = machine.throttling(before)
        measured = [worker.measured(meter, settings.new_tokens) for worker in workers]
        facts = workers[0].facts
    image = Path(settings.image).name if settings.image else "drawn"
    about = {
        "image": None if settings.no_image else image,
        "prompt_tokens": facts["prompt_tokens"],
        "visual_tokens": facts["visual_tokens"],
        "tiles": facts["tiles"],
        "grid": facts["grid"],
        "limited": facts["limited"],
        "max_tiles": settings.max_tiles,
        "max_visual_tokens": settings.max_visual_tokens,
        "new_tokens": settings.new_tokens,
        "runs": settings.runs,
        "warmup": settings.warmup,
        "threads": settings.threads,
        "device": settings.device,
    }
    return Report(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine.describe(),
        settings=about,
        measured=measured[0],
        against=measured[1] if against is not None else None,
        power=meter.about(any("power_w" in s for w in workers for s in w.samples)),
        throttling=throttling,
    )


def energy_figures(meter: Meter, span: tuple[float, float, float], new_tokens: int) -> Sample:
    """Power and energy of one request; a figure that the readings do not tell is left out.

    Energy of a token is of the decode alone: of each token after the first, as the rate counts them.
    """
    begin, first, end = span
    found: Sample = {}
    whole, decode = meter.energy(begin, end), meter.energy(first, end)
    if whole is not None:
        found |= {"power_w": whole / (end - begin), "energy_j": whole}
    if decode is not None and new_tokens > 1:
        found["energy_mj_per_token"] = 1000 * decode / (new_tokens - 1)
    return found
