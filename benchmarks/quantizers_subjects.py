"""What `quantizers.py` compares: each part of a model as we, ONNX Runtime and NNCF quantize it."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vlm_edge.benchmarks.latency import WorkerFailed
from vlm_edge.benchmarks.schema import Spread
from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.ort import open_session, processors
from vlm_edge.runtime.picture import open_picture
from vlm_edge.runtime.vlm import VLM

Feeds = dict[str, np.ndarray]
Kind = Literal["features", "logits"]
OURS, ORT, NNCF = "vlm-edge", "ONNX Runtime", "NNCF"
log = logging.getLogger(__name__)
LAST = 16  # positions of a prompt whose logits are compared, as `vlm export --int4` does


@dataclass(frozen=True)
class Task:
    """One part of the model and the data it is quantized and measured with.

    Attributes:
        graph: full precision, before any lowering.
        output: its name; `kind` says what it holds.
        feeds: of item i, caches included.
        held_out: items that are measured; the others calibrate.
    """

    part: str
    kind: Kind
    graph: Path
    output: str
    feeds: Callable[[int], Feeds]
    count: int
    held_out: tuple[int, ...]

    @property
    def used(self) -> list[int]:
        return [index for index in range(self.count) if index not in self.held_out]


class Subject(Protocol):
    """A quantized part that runs."""

    def run(self, index: int, keep: bool) -> tuple[float, np.ndarray | None]:
        """Milliseconds for item `index`, and its output if it is kept."""


@dataclass
class Row:
    """A line of the table: who quantized, how, and what it gave."""

    tool: str
    recipe: str
    math: str  # what is multiplied where weights are not INT8 by themselves
    size_mb: float
    made_s: float | None
    error: dict[str, float] = field(default_factory=dict)
    ms: Spread | None = None


def tasks(bundle: Path, data: CalibrationSet) -> list[Task]:
    """The parts of a full-precision bundle with their inputs, made by the runtime's own stages."""
    with VLM.load(bundle) as vlm:
        pixels = [vlm.pixels(open_picture(path, vlm.tiler)) for path in data.paths]
        features = [vlm.vision.run({"pixel_values": p})["features"] for p in pixels]
        embeds = [_embeds(vlm, prompt.text, [data.paths[i] for i in prompt.pictures])
                  for prompt in data.prompts]  # fmt: skip
        settings, graph = vlm.manifest.decoder, vlm.bundle.graph
        names = {spec.name for spec in vlm.manifest.engines["llm"].inputs}

    def prompt_feeds(index: int) -> Feeds:
        feeds = prefill_feeds(settings, embeds[index])
        count = embeds[index].shape[1]
        feeds["logit_positions"] = np.arange(max(0, count - LAST), count)
        return {name: value for name, value in feeds.items() if name in names}

    def of(values: Sequence[np.ndarray], name: str) -> Callable[[int], Feeds]:
        return lambda index: {name: values[index]}

    pictures, prompts = data.held_out, data.held_out_prompts
    return [
        Task("vision", "features", graph("vision"), "features", of(pixels, "pixel_values"),
             len(pixels), pictures),
        Task("connector", "features", graph("connector"), "image_features",
             of(features, "features"), len(features), pictures),
        Task("llm", "logits", graph("llm"), "logits", prompt_feeds, len(embeds), prompts),
    ]  # fmt: skip


def _embeds(vlm: VLM, text: str, images: list[Path]) -> np.ndarray:
    template = vlm.template is not None
    places = f"{vlm.manifest.prompt.image_token}\n" * len(images)
    return vlm.embed(vlm.build_prompt(text if template else places + text, images, template))


class OrtSubject:
    """A graph in ONNX Runtime, opened as the runtime opens it."""

    def __init__(self, task: Task, graph: Path) -> None:
        self._task, self._session = task, open_session(graph, task.part, None)
        self._inputs = {spec.name for spec in self._session.get_inputs()}

    def run(self, index: int, keep: bool) -> tuple[float, np.ndarray | None]:
        feeds = {k: v for k, v in self._task.feeds(index).items() if k in self._inputs}
        begin = time.perf_counter()
        (output,) = self._session.run([self._task.output], feeds)
        return 1000 * (time.perf_counter() - begin), output if keep else None


class NncfWorker:
    """The parent's end of `quantizers_nncf.py`."""

    def __init__(self, python: Path) -> None:
        script = Path(__file__).with_name("quantizers_nncf.py")
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        try:
            self.facts = self._answer()
        except WorkerFailed:
            self.close()
            raise

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer. Raises WorkerFailed, with its sentence."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the empty answer says so
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(f"the NNCF process ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"NNCF: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process; closing its stdin is the order to."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class NncfSubject:
    """A model loaded in the worker; arrays go through files in `scratch`."""

    def __init__(self, worker: NncfWorker, task: Task, model: Path, math: str | None) -> None:
        self._worker, self._task = worker, task
        self._key = f"{model}:{math}"
        self._scratch = model.parent
        answer = worker.ask(load=self._key, model=str(model), math=math, threads=processors())
        self.math: str = answer["math"]

    def run(self, index: int, keep: bool) -> tuple[float, np.ndarray | None]:
        to = self._scratch / "output.npy" if keep else None
        feeds = feed_file(self._task, index, self._scratch)
        answer = self._worker.ask(
            run=self._key, feeds=str(feeds), to=None if to is None else str(to)
        )
        return answer["ms"], None if to is None else np.load(to)


def feed_file(task: Task, index: int, folder: Path) -> Path:
    """Item `index` as .npz without the empty caches."""
    file = folder / f"{task.part}.{index}.npz"
    if not file.is_file():
        feeds = task.feeds(index).items()
        np.savez(file, allow_pickle=False, **{k: v for k, v in feeds if not k.startswith("past.")})
    return file


def subjects(
    task: Task, bundles: dict[str, Path], work: Path, worker: NncfWorker | None
) -> Iterator[tuple[Row, Subject]]:
    """Every quantizer's form of the part, full precision first; made in `work` where not there yet."""
    yield from ours(task, bundles)
    folders = {tool: work / f"{tool}-{task.part}" for tool in ("onnxruntime", "nncf")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    yield from onnxruntime(task, folders["onnxruntime"])
    if worker is not None:
        yield from nncf(task, folders["nncf"], worker)


def ours(task: Task, bundles: dict[str, Path]) -> Iterator[tuple[Row, Subject]]:
    """What the CPU runs of our bundles; the connector and vision encoder are INT8 in both."""
    for precision, folder in bundles.items():
        if precision == "int4" and task.kind == "features":
            continue
        graph = Bundle(folder).graph(task.part, "cpu")
        name = "full precision" if precision == "fp32" else f"vlm export --{precision}"
        weights = graph.with_name(f"{task.part}.data")
        row = Row(OURS, name, "f32", size_mb(graph, weights), None)
        yield row, OrtSubject(task, graph)


def onnxruntime(task: Task, folder: Path) -> Iterator[tuple[Row, Subject]]:
    """ONNX Runtime's quantizers, applied to the full-precision graph."""
    from vlm_edge.benchmarks.quantizers_ort import RECIPES

    for name, recipe in RECIPES[task.kind].items():
        path = folder / f"{slug(name)}.onnx"

        def make(recipe: Any = recipe, path: Path = path) -> float:
            feeds = [task.feeds(i) for i in task.used] if task.kind == "features" else []
            begin = time.perf_counter()
            recipe(task.graph, feeds, path)
            return time.perf_counter() - begin

        try:
            seconds = once(path, make)
        except (
            Exception
        ) as error:  # some have no form for a width; the others can still be compared
            log.warning("%s: %s of ONNX Runtime fails: %s", task.part, name, error)
            continue
        row = Row(ORT, name, "f32", size_mb(path, path.with_name(f"{path.name}.data")), seconds)
        yield row, OrtSubject(task, path)


def nncf(task: Task, folder: Path, worker: NncfWorker) -> Iterator[tuple[Row, Subject]]:
    """NNCF's, run by OpenVINO: with float32 around the integers, and as OpenVINO runs it by itself."""
    used = [str(feed_file(task, index, folder)) for index in task.used]
    shape = None
    if task.kind == "features":  # static shapes are quicker there
        shape = {name: list(value.shape) for name, value in task.feeds(0).items()}
    for name in worker.facts["recipes"][task.kind]:
        path = folder / f"{slug(name)}.xml"

        def make(name: str = name, path: Path = path) -> float:
            order = dict(make=name, graph=str(task.graph), output=task.output, feeds=used)
            return float(worker.ask(**order, shape=shape, to=str(path))["seconds"])

        seconds = once(path, make)
        size = size_mb(path, path.with_suffix(".bin"))
        for math in ("f32", None):
            subject = NncfSubject(worker, task, path, math)
            yield Row(NNCF, name, subject.math, size, seconds), subject


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def size_mb(*files: Path) -> float:
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def once(path: Path, make: Callable[[], float]) -> float:
    """Seconds that `make` took to write `path`, now or in an earlier call."""
    note = path.with_name(f"{path.name}.seconds")
    if not note.is_file():
        note.write_text(str(make()), encoding="utf-8")
    return float(note.read_text(encoding="utf-8"))
