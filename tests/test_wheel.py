"""The built wheel in an environment of its own, without torch and without the export side."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlm_edge.runtime import native

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf")
BUILT_FROM = ("benchmarks", "calibration", "export", "runtime", "src", "training")
CASE = "clip-llama"
KERNELS = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")


def output(*command: str | Path, **settings: Any) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """A virtual environment that holds the wheel; commands run outside of the repository."""

    folder: Path
    elsewhere: Path

    def run(self, name: str, *args: str | Path) -> str:
        return output(self.folder / "bin" / name, *args, cwd=self.elsewhere)

    def python(self, code: str, *args: str | Path) -> str:
        return self.run("python", "-W", "error", "-c", code, *args)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(NAME=value, ...) -> a wheel, built with these environment variables.

    Built from a copy: setuptools packs whatever an earlier build left in build/.
    """

    def make(**environment: str) -> Path:
        source = tmp_path_factory.mktemp("source")
        for name in (*BUILT_FROM, "native"):
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
        folder = tmp_path_factory.mktemp("wheel")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        command = (*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
        output(*command, env={**os.environ, **environment})
        (built,) = folder.glob("*.whl")
        return built

    return make


@pytest.fixture(scope="session")
def wheel(build: Callable[..., Path]) -> Path:
    return build()


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel with its base dependencies and the extra `cpu`, nothing else."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    output(sys.executable, "-m", "venv", folder)
    pip = (folder / "bin/python", "-m", "pip", "--disable-pip-version-check")
    output(*pip, "install", f"{wheel}[cpu]")
    return Installed(folder, tmp_path_factory.mktemp("elsewhere"))


def without_heavy(installed: Installed, body: str, *args: str | Path) -> None:
    """Run Python code in the environment, and see that it imported no heavy module."""
    check = f"\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    assert installed.python(body + check, *args).splitlines()[-1] == "[]"


def test_wheel_holds_the_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vlm_edge"}
    sources = [p.relative_to(ROOT) for f in BUILT_FROM for p in (ROOT / f).rglob("*.py")]
    places = {str(p).removeprefix("src/vlm_edge/") for p in sources}
    assert {n.removeprefix("vlm_edge/") for n in names if n.endswith(".py")} == places
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "export/demo_data").rglob("*") if p.is_file()}
    assert {n.removeprefix("vlm_edge/") for n in names if "/demo_data/" in n} == data
    assert "vlm_edge/py.typed" in names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


@pytest.mark.parametrize(
    ("compiler", "kind"),
    [
        ("", "py3-none-linux_x86_64"),
        ("false", "py3-none-linux_x86_64"),  # it is there and fails, which is found out too late
        ("no-such-compiler", "py3-none-any"),
    ],
)
@pytest.mark.skipif(not KERNELS, reason="the kernels are for Linux on x86-64, with a C++ compiler")
def test_kernels_are_in_the_wheel_where_they_compile(
    compiler: str, kind: str, build: Callable[..., Path], wheel: Path
) -> None:
    built = build(CXX=compiler) if compiler else wheel
    assert built.name.endswith(f"-{kind}.whl")
    compiled = [n for n in zipfile.ZipFile(built).namelist() if n.endswith(".so")]
    assert compiled == ([] if compiler else ["vlm_edge/runtime/_kernels.abi3.so"])


@pytest.mark.skipif(native.library() is None, reason="our kernels do not run here")
def test_installed_kernels_are_found(installed: Installed) -> None:
    code = "from vlm_edge.runtime import native; print(native.library().name)"
    assert installed.python(code).strip() == "_kernels.abi3.so"


def test_environment_is_free_of_the_export_side(installed: Installed) -> None:
    found = installed.python(
        "import importlib.util as u, sys; print([m for m in sys.argv[1:] if u.find_spec(m)])",
        *HEAVY,
    )
    assert found.strip() == "[]"


def test_import_and_every_module_of_the_runtime(installed: Installed) -> None:
    body = (
        "import importlib, pkgutil, vlm_edge, vlm_edge.runtime as r\n"
        "vlm_edge.VLM\n"
        "for m in pkgutil.walk_packages(r.__path__, 'vlm_edge.runtime.'):\n"
        # ONNX Runtime's library of operators only looks like a module.
        "    m.name.endswith('._kernels') or importlib.import_module(m.name)"
    )
    without_heavy(installed, body)


@pytest.mark.parametrize(
    "command", [("vlm", "--help"), ("vlm-export", "--help"), ("vlm", "--version")]
)
def test_scripts_are_installed(installed: Installed, command: Sequence[str]) -> None:
    assert installed.run(*command)


def test_runs_a_bundle_with_the_same_answer(
    installed: Installed,
    bundle: Callable[..., Path],
    pictures: dict[str, Path],
    vlm: Callable[..., Any],
) -> None:
    picture, prompt = pictures["wide.png"], "what is this?"
    expected = vlm(CASE).generate(prompt, images=[picture], max_new_tokens=8)
    args = ("run", bundle(CASE), picture, "-p", prompt, "--max-new-tokens", "8", "--json")
    said = json.loads(installed.run("vlm", *args))
    assert said["token_ids"] == list(expected.token_ids)
    assert said["text"] == expected.text
    body = (
        "import sys; from vlm_edge import VLM\n"
        "vlm = VLM.load(sys.argv[1])\n"
        "vlm.generate('what is this?', images=[sys.argv[2]], max_new_tokens=2)\n"
        "vlm.close()"
    )
    without_heavy(installed, body, bundle(CASE), picture)


def test_export_without_its_extra_says_which(installed: Installed, tmp_path: Path) -> None:
    command = [str(installed.folder / "bin/vlm-export"), "-o", str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed.elsewhere)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "vlm-edge[export]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_export_needs_no_torch(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """In this environment, where torch is installed, with its import forbidden."""
    code = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None)\n"
        "from vlm_edge.cli.main import main_export\n"
        "main_export()"
    )
    output(sys.executable, "-c", code, checkpoint(CASE), "--int8", "-o", tmp_path / "bundle")
    assert (tmp_path / "bundle/manifest.json").is_file()
