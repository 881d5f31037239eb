"""docs/architectures.md, written from test results: `make architectures`.

A test marked `verifies(architecture, what)` compares that architecture with its reference. Once all of
them have passed in one run, `--architectures FILE` writes the table; a whole run without the option
fails when the file in docs/ says anything else (but for the versions compared with, which it names).
"""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"
VERSIONS = "Compared with "
HEAD = """# Architectures

Written by `make architectures` from the results of the tests; not by hand. An architecture whose comparisons have not all passed is not here. In brackets: how many comparisons.

"""


class Results:
    """The marked tests of one run: what each verifies, and those that passed."""

    def __init__(self) -> None:
        self.wanted: dict[str, tuple[str, str]] = {}  # node id -> architecture, what
        self.passed: set[str] = set()
        self.partial = False

    def table(self) -> str:
        """The document, of the tests that passed."""
        whats: dict[str, Counter[str]] = defaultdict(Counter)
        files: dict[str, set[str]] = defaultdict(set)
        for node in self.passed:
            architecture, what = self.wanted[node]
            whats[architecture][what] += 1
            files[architecture].add(node.partition("::")[0])
        lines = [
            f"{VERSIONS}transformers {version('transformers')}, torch {version('torch').partition('+')[0]}.\n",
            "| `--arch` | reads `model_type` | verified against the reference | with |",
            "|---|---|---|---|",
        ]
        for name in sorted(whats):
            types = importlib.import_module(f"vlm_edge.export.archs.{name}").MODEL_TYPES
            verified = "; ".join(f"{what} ({n})" for what, n in sorted(whats[name].items()))
            command = f"pytest -m verifies {' '.join(sorted(files[name]))}"
            kinds = ", ".join(f"`{kind}`" for kind in types)
            lines.append(f"| `{name}` | {kinds} | {verified} | `{command}` |")
        return HEAD + "\n".join(lines) + "\n"


RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--architectures", type=Path, metavar="FILE", help="Write the table here.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()
    config.addinivalue_line(
        "markers", "verifies(architecture, what): compares an architecture with its reference"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    results = config.stash[RESULTS]
    for item in items:
        for marker in item.iter_markers("verifies"):
            results.wanted[item.nodeid] = marker.args[0], marker.args[1]
    everything = [str(argument) for argument in config.args] == config.getini("testpaths")
    narrowed = config.option.keyword or config.option.markexpr not in ("", "verifies")
    results.partial = bool(narrowed) or not everything


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    results = item.config.stash[RESULTS]
    report = outcome.get_result()
    if item.nodeid in results.wanted and report.when == "call" and report.passed:
        results.passed.add(item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    results, target = config.stash[RESULTS], config.getoption("--architectures")
    complete = not results.partial and results.wanted.keys() == results.passed
    if config.option.collectonly or not results.wanted:
        return
    if target is not None and not complete:
        raise pytest.UsageError("no table: it needs every comparison of a whole run to pass")
    if target is not None:
        target.write_text(results.table(), encoding="utf-8")
    elif complete and _facts(results.table()) != _facts(_read(DOCUMENT)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\n{DOCUMENT.name} does not say what was verified: run `make architectures`")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _facts(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(VERSIONS)]
