"""A machine with arm64 Python: this one, or on x86-64 Linux one emulated by qemu-user.

The emulated one is Debian's arm64 Python, unpacked by apt and dpkg-deb as an ordinary user, and wheels
for aarch64. Nothing is installed outside of its folder. What differs from a real board: no GPU, no
sensors, and times say nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# ONNX Runtime chooses its kernels by the core. The first is the one nearest to Jetson Orin's Cortex-A78AE
# that qemu 7.2 has: ARMv8.2 with half precision and dot products. The second has every extension that
# qemu knows, int8 matrices and SVE among them, as Jetson Thor's does.
EMULATED = ("cortex-a76", "max")
# ONNX Runtime from 1.28 on reads these files. The host's name no arm64 core, and it would crash (1.32).
CORES = 4
CPUINFO = """processor	: {number}
Features	: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x1
CPU part	: 0xd0b
CPU revision	: 0

"""

DEBIAN = ("python3", "libstdc++6", "qemu-user-static:amd64")
GLIBC = 36  # 2.36 of Debian 12: the newest manylinux tag that wheels may have
APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "amd64"; }};
APT::Install-Recommends "false";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
"""
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


class CannotRun(Exception):
    """One sentence: what is missing, and the way out."""


@dataclass(frozen=True)
class Machine:
    """What runs arm64 Python.

    Attributes:
        name: for people.
        python: the interpreter, as a program of this machine.
        packages: folders on its path, beside its own.
    """

    name: str
    python: Path
    packages: tuple[Path, ...]

    def run(self, *args: str | Path) -> int:
        """Run its Python; what it prints is printed. Returns the exit status."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        settings = {
            "PYTHONPATH": os.pathsep.join(map(str, self.packages)),
            "PYTHONNOUSERSITE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment = {**os.environ, **threads, **settings}
        return subprocess.run([self.python, *args], env=environment).returncode


def prepare(folder: Path, pins: Sequence[str], packages: Sequence[Path]) -> list[Machine]:
    """Machines, set up below `folder` unless they are already: this one, or each emulated core.

    Args:
        pins: their Python packages, as name==version.
        packages: folders to put on their path.

    Raises:
        CannotRun: this is no Linux on arm64 or x86-64, or a tool or package is missing.
    """
    system = f"{platform.system()} on {platform.machine()}"
    if system == "Linux on aarch64":
        return [_native(folder / "native", pins, packages)]
    if system == "Linux on x86_64":
        return _emulated(folder / "emulated", pins, packages)
    raise CannotRun(f"this is {system}; the tests run on Linux, on arm64 or (emulated) on x86-64")


def _native(folder: Path, pins: Sequence[str], packages: Sequence[Path]) -> Machine:
    python, stamp = folder / "bin" / "python", folder / "ready"
    if not _is(stamp, pins):
        print(f"setting up {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _tool(sys.executable, "-m", "venv", folder)
        _tool(python, *PIP, "install", "--only-binary=:all:", *pins)
        _mark(stamp, pins)
    return Machine(f"{platform.node()} ({platform.machine()})", python, tuple(packages))


def _emulated(folder: Path, pins: Sequence[str], packages: Sequence[Path]) -> list[Machine]:
    root, emulator, wheels = folder / "root", folder / "qemu-aarch64", folder / "packages"
    recipe = [*DEBIAN, APT, CPUINFO]
    if not _is(folder / "ready", recipe):
        print(f"setting up {root}: about 100 MB from Debian", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _unpack(folder / "apt", root, emulator)
        _give_cores(root)
        _mark(folder / "ready", recipe)
    version = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    if not _is(folder / "packages.ready", pins):
        print(f"setting up {wheels}: about 60 MB of wheels", flush=True)
        shutil.rmtree(wheels, ignore_errors=True)
        tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC + 1)]
        target = (f"--target={wheels}", f"--python-version={version}", "--implementation=cp")
        options = ("--only-binary=:all:", *target, *tags)
        _tool(sys.executable, *PIP, "install", *options, *pins)
        _mark(folder / "packages.ready", pins)
    said = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True)
    release = said.stdout.split("(")[0].split()[-1]
    machines = []
    for core in EMULATED:
        python = folder / f"python-{core}"
        program = f'"{emulator}" -cpu {core} -L "{root}" -0 "$0" "{root}/usr/bin/python{version}"'
        # The home is said: Python looks for it beside the name it was started by, which has to be this
        # script's, so that tests can start another Python.
        script = f'#!/bin/sh\nPYTHONHOME="{root}/usr" exec {program} "$@"\n'
        python.write_text(script, encoding="utf-8")
        python.chmod(0o755)
        name = f"{core}, emulated by qemu {release}"
        machines.append(Machine(name, python, (*packages, wheels)))
    return machines


def _unpack(apt: Path, root: Path, emulator: Path) -> None:
    """Debian's packages: arm64 ones into `root`, qemu's one program to `emulator`."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise CannotRun(
            "apt-get and dpkg-deb are missing: the emulated machine is made of Debian's packages; "
            "run this on Debian, in its container, or on an arm64 machine"
        )
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()  # nothing counts as installed: apt finds all that Python needs
    (apt / "apt.conf").write_text(APT.format(folder=apt), encoding="utf-8")
    environment = {"APT_CONFIG": str(apt / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
    # Sources that cannot be reached, or have no arm64, may not matter: the next call says.
    subprocess.run(["apt-get", "-qq", "update"], env=os.environ | environment)
    install = ("apt-get", "-qq", "--yes", "--download-only", "install")
    try:
        _tool(*install, *DEBIAN, environment=environment)
    except CannotRun as error:
        raise CannotRun(
            f"apt's sources do not give {', '.join(DEBIAN)} for arm64 and amd64 "
            "(Debian 12 and 13 have them)"
        ) from error
    programs = apt / "programs"
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        into = programs if package.name.endswith("_amd64.deb") else root
        _tool("dpkg-deb", "-x", package, into)
    names = ("qemu-aarch64-static", "qemu-aarch64")  # Debian 12's, 13's
    found = [path for name in names if (path := programs / "usr/bin" / name).is_file()]
    shutil.copy(found[0], emulator)
    shutil.rmtree(apt)


def _give_cores(root: Path) -> None:
    """Files below `root` are seen instead of the host's."""
    cpu, proc = root / "sys/devices/system/cpu", root / "proc"
    cpu.mkdir(parents=True)
    proc.mkdir(exist_ok=True)
    for name in ("possible", "present"):
        (cpu / name).write_text(f"0-{CORES - 1}\n", encoding="utf-8")
    text = "".join(CPUINFO.format(number=number) for number in range(CORES))
    (proc / "cpuinfo").write_text(text, encoding="utf-8")


def _tool(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | (environment or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        words = " ".join(str(word) for word in command[:6])
        raise CannotRun(f"`{words} ...` failed:\n{done.stderr.strip()}")


def _is(stamp: Path, recipe: Sequence[str]) -> bool:
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == "\n".join(recipe)


def _mark(stamp: Path, recipe: Sequence[str]) -> None:
    stamp.write_text("\n".join(recipe), encoding="utf-8")
