"""One call that says what a GPU makes of the bundles: right answers first, then time beside transformers.

    python -m vlm_edge.benchmarks.gpu                  # makes the models here, runs what is installed
    python -m vlm_edge.benchmarks.gpu run --device cpu --runs 1    # a rehearsal without a GPU
    python -m vlm_edge.benchmarks.gpu prepare FOLDER   # what a machine without a network has to be given

Every step runs in a process of its own under a time limit and ends as ok, as failed with a sentence, or
as not tried. After each the report is written, so a step that fails, hangs or is killed loses nothing
of the others. docs/gpu.md says what the figures mean.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from vlm_edge.benchmarks.gpu_report import show
from vlm_edge.benchmarks.gpu_steps import MODELS, PRECISIONS, STOPPED

SCHEMA = 1
GROUPS = ("environment", "limits", "make", "parity", "timings", "tensorrt")
MAKING = 0.45  # of the time, that making models may take where there is something to do with them
LEAST = 10  # seconds: with less left a step is not begun
CORES_EACH = 4  # of models made side by side
PROCESS = "vlm_edge.benchmarks.gpu_steps"  # that a step runs in
REHEARSED = "8.6"  # the GPU that a rehearsal builds TensorRT engines for
Status = Literal["ok", "failed", "not tried"]


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        kind: a name of `gpu_steps.STEPS`.
        seconds: it may take.
        order: what it is told.
    """

    kind: str
    seconds: float
    order: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = (self.order.get(key) for key in ("model", "precision", "device"))
        return " ".join([self.kind, *(part for part in parts if part)])


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        why: the sentence of one that is not ok.
        found: all it has found, also before it failed.
    """

    name: str
    kind: str
    order: dict[str, Any]
    status: Status
    why: str | None
    seconds: float
    found: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is asked for."""

    device: str
    work: Path
    models: tuple[str, ...]
    groups: tuple[str, ...]
    minutes: float
    wheels: Path | None
    prompt_tokens: int
    new_tokens: int
    runs: int

    def checkpoint(self, model: str) -> Path:
        return self.work / "checkpoints" / model

    def bundles(self, model: str) -> dict[str, str]:
        return {p: str(self.work / "bundles" / f"{model}-{p}") for p in PRECISIONS}


class Run:
    """Steps one after another until the time is spent; `output` is written after each."""

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings, self.output = settings, output
        self.outcomes: list[Outcome] = []
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._site = settings.work / "site"

    def all(self) -> None:
        """Every group asked for, in the order of what matters most."""
        asked = self.settings
        if asked.wheels is not None:
            self.step(Step("wheels", 150, {"wheels": str(asked.wheels), "site": str(self._site)}))
        found: dict[str, Any] = {}
        if "environment" in asked.groups:
            found = self.step(Step("environment", 60)).found
        missing = None
        if asked.device != "cpu" and found.get("gpu", True) is None:
            missing = "the driver finds no GPU here; --device cpu rehearses without one"
        rates: dict[str, float] = {}
        if "limits" in asked.groups:
            rates = self.step(Step("limits", 90, {"device": asked.device}), missing).found
        if "make" in asked.groups:
            self._make()
        for group, seconds in (("parity", 120), ("timings", 180)):
            for model in asked.models if group in asked.groups else ():
                self.step(self._judge(group, seconds, model, asked.device, rates), missing)
        if "tensorrt" in asked.groups:
            self._tensorrt(rates, missing)

    def step(self, step: Step, missing: str | None = None, until: float | None = None) -> Outcome:
        """Run one, or say why it is not tried."""
        left = min(self._left(), self._left() if until is None else until - time.monotonic())
        if missing is None and left < LEAST:
            missing = f"its share of the {self.settings.minutes:g} minutes is spent"
        begin = time.monotonic()
        if missing is None:
            click.echo(f"{step.name} ...", err=True)
            status, why, found = self._spawn(step, min(step.seconds, left))
        else:
            status, why, found = "not tried", missing, {}
        seconds = round(time.monotonic() - begin, 1)
        outcome = Outcome(step.name, step.kind, step.order, status, why, seconds, found)
        with self._lock:
            self.outcomes.append(outcome)
            self._write()
        return outcome

    def document(self) -> dict[str, Any]:
        """The report as far as it goes; docs/gpu.md describes every key."""
        asked = self.settings
        about = {
            "models": list(asked.models),
            "groups": list(asked.groups),
            "prompt_tokens": asked.prompt_tokens,
            "new_tokens": asked.new_tokens,
            "runs": asked.runs,
        }
        now = datetime.datetime.now(datetime.timezone.utc)
        return {
            "schema": SCHEMA,
            "date": now.isoformat(timespec="seconds"),
            "device": asked.device,
            "minutes": asked.minutes,
            "seconds": round(time.monotonic() - self._begin, 1),
            "settings": about,
            "steps": [_plain(outcome) for outcome in self.outcomes],
        }

    def _left(self) -> float:
        return 60 * self.settings.minutes - (time.monotonic() - self._begin)

    def _make(self) -> None:
        """Checkpoints, then bundles, several side by side: first what every later step needs."""
        asked = self.settings
        share = MAKING if {"parity", "timings", "tensorrt"} & set(asked.groups) else 1
        until = time.monotonic() + share * self._left()
        checkpoints, bundles = [], []
        for model in asked.models:
            order = {"model": model, "checkpoint": str(asked.checkpoint(model))}
            checkpoints.append(Step("checkpoint", 120, order))
            for precision, path in asked.bundles(model).items():
                more = {"precision": precision, "bundle": path}
                bundles.append(Step("bundle", 300, order | more))
        jobs = max(1, (os.cpu_count() or 1) // CORES_EACH)
        with ThreadPoolExecutor(jobs) as pool:
            for steps in (checkpoints, bundles):
                for done in [pool.submit(self.step, step, None, until) for step in steps]:
                    done.result()

    def _judge(
        self, group: str, seconds: float, model: str, device: str, rates: dict[str, float]
    ) -> Step:
        asked = self.settings
        order = {
            "model": model,
            "device": device,
            "bundles": asked.bundles(model),
            "checkpoint": str(asked.checkpoint(model)),
            "new_tokens": asked.new_tokens,
        }
        if group == "timings":
            order |= {"prompt_tokens": asked.prompt_tokens, "runs": asked.runs, "limits": rates}
        return Step(group, seconds, order)

    def _tensorrt(self, rates: dict[str, float], missing: str | None) -> None:
        """Build, then answers and times of what was built."""
        asked = self.settings
        rehearsal = asked.device == "cpu"
        for device in ("tensorrt-rtx", "tensorrt"):
            for model in asked.models:
                order = {"model": model, "device": device, "bundles": asked.bundles(model)}
                if rehearsal:
                    order["compute_capability"] = REHEARSED
                made = self.step(Step("build", 240, order), missing)
                built = [name for name, each in made.found.items() if "tensorrt" in each]
                none = missing or (None if built else "nothing was built")
                if rehearsal:
                    none = "a rehearsal has no GPU to run it on"
                for group, seconds in (("parity", 90), ("timings", 120)):
                    if group in asked.groups:
                        step = self._judge(group, seconds, model, device, rates)
                        bundles = step.order["bundles"]
                        step.order["bundles"] = {name: bundles[name] for name in built}
                        self.step(step, none)

    def _spawn(self, step: Step, seconds: float) -> tuple[Status, str | None, dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            order = {"step": step.kind, "result": str(result), **step.order}
            paths = [str(self._site)] if self._site.is_dir() else []
            paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
            process = subprocess.Popen(
                [sys.executable, "-m", PROCESS],
                stdin=subprocess.PIPE,
                stdout=2,  # the tables alone are this program's output
                text=True,
                # -m would import from the current folder
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(order), timeout=seconds)
                ended = f"its process ended with code {process.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(2)  # for an export to take away what it has half written
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()
            if not result.is_file():
                return "failed", ended, {}
            answer = json.loads(result.read_text())
            if answer["why"] == STOPPED:
                answer["why"] = f"{ended}; what it had found is kept"
            return answer["status"], answer["why"], answer["found"]

    def _write(self) -> None:
        draft = self.output.with_name(f".{self.output.name}.draft")
        draft.write_text(json.dumps(self.document(), indent=1), encoding="utf-8")
        draft.replace(self.output)


def _plain(outcome: Outcome) -> dict[str, Any]:
    """Without the paths of this machine."""
    found = asdict(outcome)
    about = ("model", "precision", "device")
    found["order"] = {key: outcome.order[key] for key in about if key in outcome.order}
    return {**found.pop("order"), **found}


def default_output() -> Path:
    """Where a lent machine brings files back from ($OUT), or here."""
    return Path(os.environ.get("OUT") or ".") / "gpu.json"


@click.group(invoke_without_command=True, help=__doc__)
@click.pass_context
def main(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        with run.make_context("run", [], parent=context) as everything:
            run.invoke(everything)


def _names(known: tuple[str, ...]) -> Any:
    def split(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(value.split(","))
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r}; known are {', '.join(known)}")
        return names

    return split


@main.command()
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/gpu"),
    show_default=True,
    help="Folder of the models; those that are there are used.",
)
@click.option("--output", type=click.Path(path_type=Path), help="The report.  [default: gpu.json]")
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="cpu rehearses: the same steps without a GPU.",
)
@click.option(
    "--models", default=",".join(MODELS), show_default=True, callback=_names(tuple(MODELS))
)
@click.option("--only", default=",".join(GROUPS), show_default=True, callback=_names(GROUPS))
@click.option("--minutes", default=9.0, show_default=True, help="For all of it.")
@click.option(
    "--wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Install these first, into WORK/site.",
)
@click.option("--prompt-tokens", default=600, show_default=True, type=click.IntRange(min=1))
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(min=2))
@click.option("--runs", default=7, show_default=True, type=click.IntRange(min=1))
def run(
    work: Path,
    output: Path | None,
    device: str,
    models: tuple[str, ...],
    only: tuple[str, ...],
    minutes: float,
    wheels: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
) -> None:
    """Run every step that the time allows and print the tables."""
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        device, work.resolve(), models, only, minutes, wheels, prompt_tokens, new_tokens, runs
    )
    made = Run(settings, output or default_output())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step's processes end too
    try:
        made.all()
    finally:
        show(made.document())
    click.echo(f"written to {made.output}")


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--parts",
    default="cuda,demo",
    show_default=True,
    help="cuda: ONNX Runtime for CUDA; demo: the demo models' parts; rtx: TensorRT-RTX.",
)
@click.option("--compute-capability", default="9.0", show_default=True, help="Of the GPU there.")
@click.option("--python", default="3.12", show_default=True, help="Its Python.")
@click.option(
    "--megabytes", default=67.0, show_default=True, help="10^6 bytes that one call takes."
)
def prepare(
    folder: Path, parts: str, compute_capability: str, python: str, megabytes: float
) -> None:
    """Collect in FOLDER what a GPU machine without a network needs, in pieces that one call can carry,
    and print the commands to give it. FOLDER is inside the repository and ignored by git: out/carry."""
    from vlm_edge.benchmarks.gpu_carry import instructions, pack

    pieces = pack(folder, parts.split(","), compute_capability, python, int(megabytes * 1e6))
    click.echo(instructions(pieces))


if __name__ == "__main__":
    main()
