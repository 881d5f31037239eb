"""The package list equals the folders, and every room imports only what the design allows it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parent.parent
TOP = {
    "vlm_edge": ROOT / "src/vlm_edge",
    **{
        f"vlm_edge.{name}": ROOT / name
        for name in ("benchmarks", "calibration", "export", "runtime", "training")
    },
}
HEAVY = {"torch", "transformers"}
GRAPHS = {"onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "gguf"}
ROOMS = {
    f"vlm_edge.{r}" for r in ("benchmarks", "calibration", "cli", "export", "runtime", "training")
}
# An engine's package, and how the names of the runtime's files that may import it begin.
ENGINES = {"onnxruntime": "ort", "tensorrt": "trt", "cuda": "cuda"}

# What no file of a room imports, not even inside a function (docs/architecture.md, "Rooms").
NEVER = {
    "runtime": HEAVY | GRAPHS | (ROOMS - {"vlm_edge.runtime"}),
    "calibration": HEAVY | {"vlm_edge.benchmarks", "vlm_edge.cli", "vlm_edge.training"},
    "benchmarks": HEAVY
    | GRAPHS
    | (ROOMS - {f"vlm_edge.{r}" for r in ("runtime", "calibration", "benchmarks")}),
    "export": {"vlm_edge.benchmarks", "vlm_edge.cli", "vlm_edge.training"},
    "training": {"vlm_edge.cli", "vlm_edge.benchmarks"},
}

PEERS = ROOT / "benchmarks/peers/engines"  # each file runs in the environment of its engine

# What it measures beside: these names, in these files.
MEASURED_BESIDE = {
    ROOT / "benchmarks/preprocessing.py": {"transformers"},
    ROOT / "benchmarks/gpu_torch.py": {"torch", "transformers"},
}

DATA = "vlm_edge.training.data"  # pictures with questions, which training and accuracy share


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_folder_with_init_is_listed_and_no_other(project: dict[str, Any]) -> None:
    found = set()
    for name, folder in TOP.items():
        for init in folder.rglob("__init__.py"):
            inside = init.parent.relative_to(folder).parts
            found.add(".".join((name, *inside)))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_python_files_is_a_package() -> None:
    for folder in TOP.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py"


def test_package_dir_maps_the_folders(project: dict[str, Any]) -> None:
    mapped = project["tool"]["setuptools"]["package-dir"]
    assert {name: ROOT / folder for name, folder in mapped.items()} == TOP


def test_shared_data_needs_no_torch() -> None:
    assert not {name.partition(".")[0] for name in imports(ROOT / "training/data.py")} & HEAVY


@pytest.mark.parametrize("room", sorted(NEVER))
def test_room_imports_only_what_the_design_allows(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        for name in imports(path):
            if name.startswith(DATA) or PEERS in path.parents:
                continue
            parents = {name[: m.start()] for m in re.finditer(r"\.|$", name)}
            bad = parents & NEVER[room] - MEASURED_BESIDE.get(path, set())
            assert not bad, f"{path.relative_to(ROOT)} imports {bad.pop()}"


def test_an_engine_s_own_files_import_it() -> None:
    """Nothing else knows it exists."""
    for engine, prefix in ENGINES.items():
        users = {p.name for p in (ROOT / "runtime").rglob("*.py") if engine in imports(p)}
        others = {name for name in users if not name.startswith(prefix)}
        assert not others, f"{engine} is imported by {others}"


def test_runtime_bans_what_the_project_bans(project: dict[str, Any]) -> None:
    """A nested ruff.toml replaces the list of pyproject.toml: it must repeat it."""
    nested = tomllib.loads((ROOT / "runtime/ruff.toml").read_text(encoding="utf-8"))
    everywhere = project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    here = nested["lint"]["flake8-tidy-imports"]["banned-api"]
    assert everywhere.items() <= here.items()
    assert HEAVY | {"onnx", "onnx_ir", "onnxscript", "vlm_edge.export"} <= set(here)


def test_base_install_brings_no_more_than_the_runtime_needs(project: dict[str, Any]) -> None:
    names = {re.split(r"[<>=\[ ]", d)[0] for d in project["project"]["dependencies"]}
    assert names == {"numpy", "pillow", "tokenizers", "jinja2", "click", "rich"}
    extras = project["project"]["optional-dependencies"]
    assert set(extras) >= {"cpu", "gpu", "export", "demo", "verify", "train", "bench", "dev"}


def test_every_file_says_what_it_is_in_the_oldest_python() -> None:
    for folder in (*TOP.values(), ROOT / "tests"):
        for path in folder.rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
