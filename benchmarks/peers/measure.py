"""Peers on one model in interleaved rounds: each variant in a process of its own, one at work at a time."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.benchmarks.latency import WorkerFailed
from vlm_edge.benchmarks.peers import environments
from vlm_edge.benchmarks.peers.environments import OURS, Process
from vlm_edge.benchmarks.peers.limits import Limits
from vlm_edge.benchmarks.peers.models import Model, materialize, prompt, question
from vlm_edge.benchmarks.peers.protocol import Bits, Engine

Progress = Callable[[str, int, int], None]
NOT_INSTALLED = "not installed"
CHECKED = 32  # tokens, of the prompt that every peer continues for comparison and of the answer
PAUSE = (
    0.3  # seconds between runs: threads that spin for a while after one must not disturb the next
)


@dataclass(frozen=True)
class Settings:
    """What every run does."""

    rounds: int = 5
    threads: int = 2
    context: int = 600  # tokens of the prompt
    steps: int = 64  # decoded after it


@dataclass
class Row:
    """One variant of one peer.

    Attributes:
        problem: why there are no figures; None where there are.
        samples: one of each round, {"prefill_s", "decode_s"} or {"encode_s"}.
        memory: peaks of its process, bytes: VmHWM and RssAnon; loading and a first run included.
        tokens: the first greedy tokens after the prompt that all peers get.
        states: a vision encoder's output for the picture that all peers get, [1, tokens, width].
    """

    peer: str
    title: str
    variant: str
    bits: Bits
    problem: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    load_s: float | None = None
    tokens: list[int] | None = None
    states: np.ndarray | None = field(default=None, repr=False)


def engine(name: str) -> Engine:
    """A file of `engines/`; the peer's own packages are not imported."""
    found: Any = importlib.import_module(f"{environments.ENGINES}.{name}")
    return found


def rows(model: Model, peers: Sequence[str]) -> list[Row]:
    """All variants of the peers that can hold this kind of model."""
    return [
        Row(name, engine(name).TITLE, variant, bits)
        for name in peers
        for variant, bits in engine(name).VARIANTS[model.kind].items()
    ]


def artefact(folder: Path, model: Model, row: Row) -> Path:
    """Where a variant of the model's weights is kept."""
    return folder / "models" / model.name / f"{row.peer}-{row.variant.replace(' ', '-')}"


def prepare(folder: Path, model: Model, table: Sequence[Row], progress: Progress) -> None:
    """Write every variant that is not there yet; what fails becomes the row's problem."""
    source, llava = materialize(model, folder / "models" / model.name)
    for number, row in enumerate(table):
        progress(f"prepare {model.name}", number, len(table))
        program = environments.python(folder, row.peer)
        target = artefact(folder, model, row)
        if program is None:
            row.problem = NOT_INSTALLED
        elif not target.exists():
            with _process(folder, program, row) as process:
                draft = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
                try:
                    process.ask(
                        prepare={
                            "kind": model.kind,
                            "source": str(source),
                            "llava": str(llava),
                            "variant": row.variant,
                            "target": str(draft),
                        }
                    )
                    draft.rename(target)
                except WorkerFailed as error:
                    row.problem = str(error)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    progress(f"prepare {model.name}", len(table), len(table))


def measure(
    folder: Path, model: Model, table: Sequence[Row], settings: Settings, progress: Progress
) -> None:
    """Load every prepared variant, warm each up, then run them in turn; figures go into the rows."""
    with contextlib.ExitStack() as stack:
        running: list[tuple[Row, Process]] = []
        for number, row in enumerate(table):
            progress(f"load {model.name}", number, len(table))
            program = environments.python(folder, row.peer)
            if row.problem is None and program is not None:
                process = stack.enter_context(_process(folder, program, row))
                try:
                    _start(process, row, folder, model, settings)
                    running.append((row, process))
                except WorkerFailed as error:
                    row.problem = str(error)
        progress(f"load {model.name}", len(table), len(table))
        for round_number in range(settings.rounds):
            progress(f"measure {model.name}", round_number, settings.rounds)
            for row, process in list(running):
                time.sleep(PAUSE)
                try:
                    _run(
                        process, model, settings, 2 * round_number + 1
                    )  # after idling: not counted
                    row.samples.append(_run(process, model, settings, 2 * round_number + 2))
                except WorkerFailed as error:
                    row.problem = str(error)
                    row.samples.clear()
                    running.remove((row, process))
        progress(f"measure {model.name}", settings.rounds, settings.rounds)


@contextlib.contextmanager
def _process(folder: Path, program: Path, row: Row) -> Iterator[Process]:
    command = environments.worker(program, row.peer)
    process = Process(command, f"{row.title} {row.variant}", folder / "workers.log")
    try:
        yield process
    finally:
        process.close()


def _start(process: Process, row: Row, folder: Path, model: Model, settings: Settings) -> None:
    """Load, note what it answers to the common question, and warm up; memory is watched meanwhile."""
    load = {
        "kind": model.kind,
        "target": str(artefact(folder, model, row)),
        "variant": row.variant,
        "threads": settings.threads,
    }
    with environments.watched(process) as peak:
        answer = process.ask(load=load)
        row.load_s, row.versions = answer["load_s"], answer["versions"]
        if model.kind == "language":
            common = question(model, folder / "models" / model.name / "source", CHECKED)
            row.tokens = process.ask(generate=common, steps=CHECKED - 1)["tokens"]
        else:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "states.npy"
                process.ask(encode=0, size=model.config["image_size"], save=str(path))
                row.states = np.load(path)
        _run(process, model, settings, 0)
    row.memory = peak


def _run(process: Process, model: Model, settings: Settings, seed: int) -> dict[str, float]:
    """One sample; every round has a prompt or picture of its own, the same for all peers."""
    if model.kind == "language":
        tokens = prompt(model, settings.context, seed)
        answer = process.ask(generate=tokens, steps=settings.steps)
        found = len(answer["tokens"])
        if found != settings.steps + 1:
            raise WorkerFailed(
                f"{process.name}: {found} tokens came where {settings.steps + 1} were asked"
            )
        return {"prefill_s": answer["prefill_s"], "decode_s": answer["decode_s"]}
    answer = process.ask(encode=seed, size=model.config["image_size"], save=None)
    return {"encode_s": answer["encode_s"]}


def machine_limits(folder: Path, threads: int) -> Limits | None:
    """The machine's rates; None without transformers' environment, whose torch measures them."""
    program = environments.python(folder, "transformers")
    if program is None:
        return None
    with _process(
        folder, program, Row("transformers", "transformers", "limits", "fp32")
    ) as process:
        compute = process.ask(rates=threads)
        return Limits(compute.pop("read"), compute)


def ours_alike(row: Row, table: Sequence[Row]) -> Row | None:
    """Our row of the same bits; full precision stands for bf16, which we do not have."""
    bits = "fp32" if row.bits == "bf16" else row.bits
    alike = (other for other in table if other.peer == OURS and other.bits == bits)
    return next((other for other in alike if other.samples), None)
