"""The memory that is free for building an engine, and what of it a layer may use as workspace."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_edge.runtime.jetson import meminfo

LEAST, MOST = (
    64 << 20,
    2 << 30,
)  # bytes of workspace; more than the upper bound finds no better layers
SHARE = 4  # of the free memory one part is workspace: weights and plan take the rest


def available(root: Path = Path("/"), gpu_free: int | None = None) -> int:
    """Bytes that an allocation for the GPU can take now.

    Args:
        root: of the system's files.
        gpu_free: of a discrete GPU, as its driver says; None where the GPU shares the system's memory
            or there is none.

    Returns:
        The discrete GPU's free memory, else MemAvailable or what is left of this process's control
        group, whichever is less; 0 where the system does not say.
    """
    if gpu_free is not None:
        return gpu_free
    free = int(1e6 * meminfo(root).get("MemAvailable", 0))
    left = _left_in_group(root)
    return free if left is None else min(free, left)


def workspace_bytes(free: int) -> int:
    """TensorRT's limit for what one layer uses beside its inputs and outputs.

    Its own default is the whole memory, which on a board is also the system's and the weights'.
    """
    return max(LEAST, min(free // SHARE, MOST))


def _left_in_group(root: Path) -> int | None:
    """Bytes that the process's control group may still take; file pages that it would give up first
    count as free. None where there is no limit."""
    groups = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    folders = {groups, groups / (own[1] if own else "")}
    left = []
    for folder in folders:
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            stat = re.search(r"^inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            left.append(int(limit) - int(used) + (int(stat[1]) if stat else 0))
    old = groups / "memory"  # version 1
    limit, used = _text(old / "memory.limit_in_bytes"), _text(old / "memory.usage_in_bytes")
    if limit.isdigit() and used.isdigit():
        left.append(int(limit) - int(used))
    return max(0, min(left)) if left else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
