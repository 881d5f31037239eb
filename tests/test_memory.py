"""The peak of anonymous memory while something runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlm_edge.export import memory
from vlm_edge.export.memory import PeakMemory, rss_anon

MEBI = 1 << 20


# In a process of its own: what earlier tests leave to the garbage collector may be freed meanwhile.
PEAK = """
import time
import numpy as np
from vlm_edge.export.memory import PeakMemory, rss_anon

MEBI = 1 << 20
before = rss_anon()
with PeakMemory(interval=0.005) as watched:
    block = np.ones(64 * MEBI, np.uint8)
    time.sleep(0.1)
    del block
    time.sleep(0.02)
assert before > MEBI
assert 60 * MEBI < watched.peak - before < 90 * MEBI, (before, watched.peak)
after = watched.peak
more = np.ones(64 * MEBI, np.uint8)
time.sleep(0.03)
assert watched.peak == after  # it stops watching at the end
assert more.any()
"""


def test_the_peak_is_seen_and_kept() -> None:
    ended = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.ones(64 * MEBI, np.uint8))
    with PeakMemory(interval=0.005) as watched:
        before = rss_anon()
        assert np.load(tmp_path / "big.npy", mmap_mode="r").sum() == 64 * MEBI
        time.sleep(0.03)
    assert watched.peak - before < 16 * MEBI


def test_the_kernels_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmRSS:\t   9 kB\nRssAnon:\t   7 kB\n")
    assert rss_anon() == 7168  # proc(5): its kB are 1024 bytes


@pytest.mark.parametrize("text", [None, "Name: x\nVmRSS: 1 kB\n"])
def test_a_system_that_does_not_say_gives_0(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    if text is not None:
        (tmp_path / "status").write_text(text)
    assert rss_anon() == 0
    with PeakMemory() as watched:
        pass
    assert watched.peak == 0
