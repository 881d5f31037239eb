"""Tiny checkpoints of every architecture, by the name of their case."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import tiny_next
from tiny_blip2 import BLIP_CASES, build_blip
from tiny_idefics import IDEFICS_CASES, build_idefics
from tiny_mllama import MLLAMA_CASES, build_mllama
from tiny_open_flamingo import OPEN_FLAMINGO_CASES, build_open_flamingo
from tiny_smolvlm import SMOL_CASES, build_smol

BUILDERS = (
    ({**tiny.CASES, **tiny_next.CASES}, tiny.build),
    (SMOL_CASES, build_smol),
    (BLIP_CASES, build_blip),
    (IDEFICS_CASES, build_idefics),
    (MLLAMA_CASES, build_mllama),
    (OPEN_FLAMINGO_CASES, build_open_flamingo),
)


def build_case(case: str, folder: Path) -> Path:
    """The checkpoint of a case, in `folder`."""
    (build,) = (build for cases, build in BUILDERS if case in cases)
    if build is build_open_flamingo and find_spec("open_flamingo") is None:
        pytest.skip("requirements/open-flamingo.txt is not installed")
    return build(case, folder)
