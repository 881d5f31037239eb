"""Where power can be read: a board's monitors, `tegrastats`, a GPU's driver, an x86 processor's counters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vlm_edge.benchmarks import tegrastats
from vlm_edge.runtime import jetson


class Unreadable(Exception):
    """There is no power to be read here; the words say why."""


class Source(Protocol):
    """Where readings come from.

    Attributes:
        name: what is read.
        covers: what the watts are of.
        paced: `read` itself waits for the next value.
    """

    name: str
    covers: str
    paced: bool

    def read(self) -> float:
        """Watts now.

        Raises:
            OSError, EOFError: there will be no more.
        """

    def close(self) -> None: ...


class Rails:
    """The power monitors of a Jetson in hwmon: an INA3221's volts and amperes, an INA238's power.

    Source: the kernel's documentation of ina3221 (mV, mA) and ina238 (uW).
    """

    paced = False

    def __init__(self, root: Path = Path("/")) -> None:
        self._rails: dict[str, tuple[Path, ...]] = {}
        for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
            if _text(monitor / "name") == "ina3221":
                self._rails |= _channels(monitor)
            elif _text(monitor / "name") == "ina238":
                label = _text(monitor / "label") or "VIN"
                self._rails[label] = (monitor / "power1_input",)
        if not self._rails:
            raise Unreadable("no INA3221 or INA238 power monitor in /sys/class/hwmon")
        used = tegrastats.counted(dict.fromkeys(self._rails, 0.0))
        self.name, self.covers = "hwmon", _covers(used)
        self._used = [self._rails[rail] for rail in used]
        try:
            self.read()
        except (OSError, ValueError) as error:
            raise Unreadable(f"the power monitors in /sys/class/hwmon: {error}") from error

    def rails(self) -> dict[str, float]:
        """Watts by rail, all of them."""
        return {rail: _watts(files) for rail, files in self._rails.items()}

    def read(self) -> float:
        return sum(_watts(files) for files in self._used)

    def close(self) -> None:
        pass


class Child:
    """A program that prints a line for each reading.

    Args:
        command: it and its arguments.
        watts: of a line; None passes it over.
        covers: what they are of.
    """

    paced = True

    def __init__(
        self, command: Sequence[str], watts: Callable[[str], float | None], covers: str
    ) -> None:
        self.name, self.covers = command[0], covers
        self._watts = watts
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise Unreadable(f"{command[0]}: {error.strerror}") from error

    def read(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            watts = self._watts(line)
            if watts is not None:
                return watts
        raise EOFError(f"{self.name} prints no power")

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Rapl:
    """An x86 processor's own energy counters: the mean power since the last reading.

    Source: the kernel's documentation of powercap (energy_uj wraps at max_energy_range_uj). Only root
    may read them on most systems.
    """

    paced = False
    name, covers = "RAPL", "the processor's packages, without memory and the rest of the machine"

    def __init__(self, root: Path = Path("/")) -> None:
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        self._zones = [z for z in zones if _text(z / "name").startswith("package")]
        if not self._zones:
            raise Unreadable("this processor has no energy counters in /sys/class/powercap")
        try:
            self._ranges = [int(_text(zone / "max_energy_range_uj")) for zone in self._zones]
            self._last = self._counters()
        except (OSError, ValueError) as error:
            raise Unreadable(
                "only root may read the processor's energy counters (/sys/class/powercap)"
            ) from error
        self._at = time.monotonic()

    def read(self) -> float:
        time.sleep(max(0.0, 0.001 - (time.monotonic() - self._at)))  # not twice at one moment
        now, counters = time.monotonic(), self._counters()
        steps = zip(counters, self._last, self._ranges, strict=True)
        spent = sum((new - old) % (most + 1) for new, old, most in steps) / 1e6
        passed = now - self._at
        self._at, self._last = now, counters
        return spent / passed

    def _counters(self) -> list[int]:
        return [int((zone / "energy_uj").read_text(encoding="ascii")) for zone in self._zones]

    def close(self) -> None:
        pass


def nvidia_smi_watts(line: str) -> float | None:
    """ "38.12 W" or "38.12"; None for the heading and for "[N/A]"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(?: W)?\s*", line)
    return float(found[1]) if found else None


def find(device: str, root: Path = Path("/")) -> Source:
    """The source of this machine's power that tells of `device`.

    Raises:
        Unreadable: there is none.
    """
    if jetson.read(root) is not None:
        try:
            return Rails(root)
        except Unreadable:
            return _tegrastats()
    if device == "cpu":
        return Rapl(root)
    program = shutil.which("nvidia-smi")
    if program is None:
        raise Unreadable("there is no nvidia-smi to ask for the GPU's power")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    query = ("--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "100", "-i", gpu)
    return Child([program, *query], nvidia_smi_watts, "the GPU's board, without the machine")


def _tegrastats() -> Source:
    program = shutil.which("tegrastats")
    if program is None:
        raise Unreadable("there is neither a power monitor in /sys/class/hwmon nor tegrastats")

    def watts(line: str) -> float | None:
        return tegrastats.total_watts(tegrastats.parse(line).rails)

    return Child([program, "--interval", "100"], watts, "the board, by the rails tegrastats prints")


def _channels(monitor: Path) -> dict[str, tuple[Path, ...]]:
    """An INA3221's rails; its channel 7 is the sum of shunt voltages and has no current."""
    found: dict[str, tuple[Path, ...]] = {}
    for label in sorted(monitor.glob("in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        current = monitor / f"curr{number}_input"
        if current.exists() and _text(label) not in ("", "NC"):
            found[_text(label)] = (monitor / f"in{number}_input", current)
    return found


def _watts(files: tuple[Path, ...]) -> float:
    """Millivolts times milliamperes, or microwatts."""
    product = 1
    for file in files:
        product *= int(file.read_text(encoding="ascii"))
    return product / 1e6


def _covers(rails: Sequence[str]) -> str:
    if rails == ("VIN",):
        return "the whole board (VIN)"
    if len(rails) == 1:
        return f"the whole module ({rails[0]})"
    return f"the module, as the sum of {', '.join(rails)}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
