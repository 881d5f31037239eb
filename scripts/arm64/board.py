"""A pytest plugin: the tests as a board can run them, without torch, without the export side.

`python -m pytest --noconftest -p board tests/...`. Test files import their references (transformers, torch)
at the top; here such an import succeeds, and what touches one skips the test and says so. Bundles come from
the folder $ARM64_BUNDLES, as `bundles.py` left them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import hypothesis
import pytest

# What the runtime never has (runtime/ruff.toml bans it there), and what its tests compare it with.
PACKAGES = (
    "gguf ml_dtypes onnx onnx_ir onnxscript safetensors tensorrt_rtx_bindings torch transformers"
)
EXPORT = ("vlm_edge.export.checkpoint", "vlm_edge.export.pipeline")  # they make bundles
ABSENT = frozenset([*PACKAGES.split(), *EXPORT])
BUNDLES = Path(os.environ["ARM64_BUNDLES"])

hypothesis.settings.register_profile(
    "board", deadline=None, suppress_health_check=list(hypothesis.HealthCheck), max_examples=20
)
hypothesis.settings.load_profile("board")


class Absent(ModuleType):
    """A name of a package that is not here: may be imported, named and inherited from, not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return ()

    def use(self, *_: Any, **__: Any) -> NoReturn:
        raise pytest.skip.Exception(f"needs {self.__name__}", allow_module_level=True)

    __call__ = __iter__ = __getitem__ = __bool__ = __len__ = __enter__ = use


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        absent = name in ABSENT or name.partition(".")[0] in ABSENT
        return ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, _: ModuleType) -> None: ...


sys.meta_path.insert(0, Finder())

# The tests' own fixtures, but for those that make a checkpoint. pytest finds them by these names.
from conftest import Cache, model, picture, pictures, shared, vlm  # noqa: F401  # fixtures


@pytest.fixture(scope="session")
def bundle() -> Callable[..., Path]:
    """bundle(case, precision="fp32") -> folder of a bundle made on the other machine."""

    def find(case: str, precision: str = "fp32") -> Path:
        folder = BUNDLES / f"{case}-{precision}"
        if not folder.is_dir():
            pytest.skip(f"needs the bundle {folder.name}")
        return folder

    return Cache(find)


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    def refuse(_: str) -> NoReturn:
        pytest.skip("needs a checkpoint")

    return refuse


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "verifies(architecture, what): see architecture_table.py")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        said = report.longrepr[2] if isinstance(report.longrepr, Sequence) else str(report.longrepr)
        reason = said.removeprefix("Skipped: ").split(".")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"skipped {count}: {reason}")
