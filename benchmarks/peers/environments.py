"""One virtual environment a peer, with the versions of `requirements/`, and processes in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vlm_edge
from vlm_edge import benchmarks
from vlm_edge.benchmarks import peers
from vlm_edge.benchmarks.latency import WorkerFailed, WorkerTraceback

REQUIREMENTS = Path(__file__).with_name("requirements")
MARKER = "ready"  # holds the hash of the requirements that the environment was made from
ENGINES = "vlm_edge.benchmarks.peers.engines"
OURS = "ours"
NAMES = (OURS, "llama_cpp", "openvino", "onnxruntime_genai", "transformers")

# The peers' environments do not have vlm_edge: its folders are made known, none of its __init__ runs.
BOOTSTRAP = """\
import json, runpy, sys, types
for name, folders in json.loads(sys.argv.pop(1)).items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = folders
runpy.run_module("vlm_edge.benchmarks.peers.worker", run_name="__main__")
"""
PACKAGES = {module.__name__: list(module.__path__) for module in (vlm_edge, benchmarks, peers)}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",  # every model is a local folder
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONSAFEPATH": "1",  # -m would import from the current folder
    "PYTHONWARNINGS": "ignore",
}


def python(folder: Path, name: str) -> Path | None:
    """The interpreter of a peer's environment below `folder`; None where it is not installed."""
    if name == OURS:
        return Path(sys.executable)
    marker = folder / "environments" / name / MARKER
    if not marker.is_file() or marker.read_text() != fingerprint(name):
        return None
    return _interpreter(folder, name)


def worker(program: Path, name: str) -> list[str]:
    """The command of a peer's worker, run by its interpreter."""
    module = f"{ENGINES}.{name}"
    if name == OURS:
        return [str(program), "-m", "vlm_edge.benchmarks.peers.worker", module]
    # -I: no module of the current folder or of PYTHONPATH
    return [str(program), "-I", "-c", BOOTSTRAP, json.dumps(PACKAGES), module]


def fingerprint(name: str) -> str:
    """A hash of a peer's requirements files."""
    digest = hashlib.sha256()
    for path in requirements(name):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def requirements(name: str) -> list[Path]:
    """The files to install, in this order; one that ends in -no-deps.txt without dependencies."""
    files = [REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}-no-deps.txt"]
    return [path for path in files if path.is_file()]


def create(folder: Path, name: str, log: Path) -> None:
    """Make or repair a peer's environment; all that pip says goes to `log`.

    Raises:
        WorkerFailed: pip fails; the sentence holds its last line.
    """
    place = folder / "environments" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / MARKER).unlink(missing_ok=True)
    program = str(_interpreter(folder, name))
    # torch by itself first: beside others pip may take a newer build, with gigabytes of CUDA packages.
    torch = [line for path in requirements(name) for line in path.read_text().splitlines()
             if line.startswith("torch==")]  # fmt: skip
    pip = [program, "-m", "pip", "install", "--disable-pip-version-check"]
    steps = [[sys.executable, "-m", "venv", "--clear", str(place / "venv")]]
    steps += [[*pip, *torch]] if torch else []
    for path in requirements(name):
        deps = ["--no-deps"] if path.stem.endswith("-no-deps") else []
        steps.append([*pip, *deps, "-r", str(path)])
    native = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}  # for llama-cpp-python
    with log.open("w", encoding="utf-8") as file:
        for step in steps:
            done = subprocess.run(
                step, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **native}
            )
            if done.returncode:
                raise WorkerFailed(f"setting up {name} failed: {_last_line(log)} (see {log})")
    (place / MARKER).write_text(fingerprint(name))


def _interpreter(folder: Path, name: str) -> Path:
    scripts = "Scripts" if os.name == "nt" else "bin"
    return folder / "environments" / name / "venv" / scripts / "python"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]


class Process:
    """The parent's end of `worker.py`: a peer's engine in the peer's environment.

    Attributes:
        name: for messages.
    """

    def __init__(self, command: Sequence[str], name: str, log: Path) -> None:
        self.name = name
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **SETTINGS},
            )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            WorkerFailed: the process reports an error or has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the empty answer says so
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerFailed(f"{self.name} ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}") from WorkerTraceback(
                answer["traceback"]
            )
        return answer

    def memory(self) -> dict[str, int]:
        """VmHWM (the largest resident set so far) and RssAnon (now), bytes; empty without /proc."""
        try:
            text = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return {}
        pairs = (line.split() for line in text.splitlines())
        return {p[0][:-1]: 1024 * int(p[1]) for p in pairs if p[0] in ("VmHWM:", "RssAnon:")}

    def close(self) -> None:
        """End the process; closing its stdin is the order to."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextmanager
def watched(process: Process, interval: float = 0.02) -> Iterator[dict[str, int]]:
    """Peaks of a process meanwhile, bytes: RssAnon as sampled, VmHWM as the system keeps it.

    RssAnon leaves out memory-mapped files: those pages are given up when another process needs them.
    """
    peak: dict[str, int] = {}
    done = threading.Event()

    def look() -> None:
        for key, value in process.memory().items():
            peak[key] = max(value, peak.get(key, 0))

    def watch() -> None:
        while not done.wait(interval):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        look()
