"""`make test-arm64`: the runtime on arm64, against x86-64.

On x86-64 Linux: sets up an emulated arm64 machine (`machine.py`; once, in .arm64/), makes tiny bundles and
records what they answer here (`bundles.py`, `ask.py`), then runs the built wheel there, without torch:
the same answers (`compare.py`), and the runtime's own tests (`board.py`).

On arm64 Linux: the same with this machine's own Python, once .arm64/bundles and .arm64/record of an x86-64
machine have been copied here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from compare import compare
from machine import CannotRun, Machine, prepare

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FOLDER = ROOT / ".arm64"
BUNDLES, RECORD, WHEEL = FOLDER / "bundles", FOLDER / "record", FOLDER / "wheel"
EXTRA = "cpu"  # of pyproject.toml: the engine
TOOLS = ("pytest", "hypothesis")
SOURCES = ("benchmarks", "calibration", "export", "native", "runtime", "src", "training")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
TESTS = (  # what the runtime does, stage by stage
    *("bundle", "manifest", "plans"),
    *("images", "preprocess", "tile_limits", "tiling_anyres", "tiling_overlap", "tiling_pixels"),
    *("tiling_split", "prompt", "tokenizer", "splice", "media"),
    *("decoder", "kv_cache", "lowering_llm", "sampling", "vlm", "vlm_errors", "chat"),
    *("cli", "cli_tiling"),
)


@contextmanager
def step(what: str) -> Iterator[None]:
    print(f"== {what}", flush=True)
    begin = time.monotonic()
    yield
    print(f"   {time.monotonic() - begin:.0f} s", flush=True)


def pins() -> list[str]:
    """The packages to test with, at this environment's versions: then only the machines differ."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(rf"^(?:dependencies|{EXTRA}) = \[(.*)\]$", text, re.MULTILINE)
    asked = [*re.findall(r'"([\w-]+)', " ".join(lists)), *TOOLS]
    return [f"{name}=={version(name)}" for name in asked]


def record() -> None:
    """Bundles, and what they answer on this machine with ONNX Runtime's own kernels."""
    for folder in (BUNDLES, RECORD):
        shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "VLM_EDGE_NATIVE": "0", "XDG_CACHE_HOME": str(FOLDER / "cache")}
    for command in (("bundles.py", BUNDLES), ("ask.py", BUNDLES, RECORD)):
        done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], env=environment)
        if done.returncode:
            raise CannotRun(f"{command[0]} failed on this machine; its message is above")
    (RECORD / "pins.json").write_text(json.dumps(pins()), encoding="utf-8")


def build() -> None:
    """The wheel without kernels (they are for x86-64), unpacked: what pip would do with a pure one."""
    shutil.rmtree(WHEEL, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        source, built = Path(work, "source"), Path(work, "built")
        for name in SOURCES:  # a copy: setuptools packs whatever an earlier build left in build/
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        for name in FILES:
            shutil.copy(ROOT / name, source / name)
        native = platform.machine() == "aarch64"
        isolated = () if native else ("--no-build-isolation",)  # where pip has setuptools
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel")
        command = [*pip, "--no-deps", *isolated, "-w", built, source]
        done = subprocess.run(command, env={**os.environ, "CXX": "no-compiler-for-arm64"})
        if done.returncode:
            raise CannotRun("the wheel was not built; pip's message is above")
        (wheel,) = built.glob("*.whl")
        if not wheel.name.endswith("-py3-none-any.whl"):
            raise CannotRun(f"{wheel.name} is not a pure wheel")
        print(f"   {wheel.name}")
        shutil.unpack_archive(wheel, WHEEL, "zip")


def answers(machine: Machine) -> bool:
    results = FOLDER / "answers"
    shutil.rmtree(results, ignore_errors=True)
    if machine.run(HERE / "ask.py", BUNDLES, results, RECORD):
        print("   FAILED: the runtime's message is above")
        return False
    here, there = (json.loads((f / "machine.json").read_text("utf-8")) for f in (RECORD, results))
    print(f"   {there['machine']} against {here['machine']}:", end=" ")
    print(", ".join(f"{name} {number}" for name, number in there["versions"].items()))
    lines, failures = compare(RECORD, results)
    for name in there["heavy"]:
        failures.append(f"the runtime imported {name}")
    if there["versions"] != here["versions"]:
        failures.append(f"the record was made with {here['versions']}: other versions")
    for line in [*lines, *(f"FAILED {failure}" for failure in failures)]:
        print(f"   {line}")
    return not failures


def tests(machine: Machine) -> bool:
    options = ("-q", "--noconftest", "-p", "board", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    files = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    return machine.run("-m", "pytest", *options, *files) == 0


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    try:
        if platform.machine() == "aarch64":
            if not (RECORD / "pins.json").is_file():
                raise CannotRun(
                    "nothing to compare with: run `make test-arm64` on an x86-64 machine, and copy "
                    "its .arm64/bundles and .arm64/record here"
                )
        else:
            with step("bundles of every family, and their answers on this machine"):
                record()
        wanted = json.loads((RECORD / "pins.json").read_text(encoding="utf-8"))
        with step("arm64 Python and packages"):
            machines = prepare(FOLDER, wanted, (WHEEL, HERE))
        with step("wheel"):
            build()
        passed = []
        for machine in machines:
            with step(f"the same answers on {machine.name}"):
                passed.append(answers(machine))
        with step(f"the runtime's tests on {machines[0].name}"):
            os.environ["ARM64_BUNDLES"] = str(BUNDLES)
            passed.append(tests(machines[0]))
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
