"""Architectures found by name and by model_type; an unknown one and a broken file are different errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_edge.errors import BrokenArchitecture, UnknownArchitecture, UnsupportedConfig
from vlm_edge.export import archs

GOOD = "MODEL_TYPES = ('better',)\nRENAMES = ()\ndef read(checkpoint, processor, prompt): ...\n"


@pytest.fixture
def extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second folder of architecture files."""
    import sys

    monkeypatch.setattr(archs, "__path__", [*archs.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(archs.__name__):
            del sys.modules[name]
            delattr(archs, name.rpartition(".")[2])


def test_llava_is_there_and_complete() -> None:
    assert "llava" in archs.known()
    assert all(hasattr(archs.find("llava"), value) for value in archs.REQUIRED)
    assert archs.find_for("llava") == ("llava", archs.find("llava"))


@pytest.mark.parametrize(
    "name", ["florence", "", "../llava", "llava.py", "__init__", "LLaVA", "os"]
)
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        archs.find(name)
    assert repr(name) in str(caught.value)
    for known in archs.known():
        assert known in str(caught.value)


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(UnknownArchitecture, match=r"'fuyu'.*llava"):
        archs.find_for("fuyu")
    with pytest.raises(UnsupportedConfig, match=r"model_type.*llava"):
        archs.find_for(None)


def test_a_new_file_is_found(extra: Path) -> None:
    before = archs.known()
    (extra / "better.py").write_text(GOOD)
    assert archs.known() == sorted(["better", *before])
    assert archs.find_for("better") == ("better", archs.find("better"))
    assert archs.find_for("llava")[0] == "llava"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        ("def read(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("MODEL_TYPES = ('odd',)\n", "RENAMES, read"),
        ("", "MODEL_TYPES, RENAMES, read"),
    ],
)
def test_a_broken_file_is_another_error(text: str, said: str, extra: Path) -> None:
    (extra / "odd.py").write_text(text)
    with pytest.raises(BrokenArchitecture) as caught:
        archs.find("odd")
    assert "'odd'" in str(caught.value)
    assert said in str(caught.value)
