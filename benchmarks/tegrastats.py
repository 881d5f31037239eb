"""A line of NVIDIA's `tegrastats`: power by rail, memory, temperatures and the GPU's load.

Formats of JetPack 4 to 7; `tests/fixtures/jetson/README.md` names where each was published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Rails that measure what comes into the module or the board: all other rails are fed from them.
TOTALS = ("VIN", "VDD_IN", "POM_5V_IN")
# Rails fed from another rail of the list: AGX Orin's memory, from its 5 V.
PARTS = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}

# "VDD_IN 4900mW/5000mW", with a third number on JetPack 7, without "mW" on JetPack 4: now/mean/most.
_RAIL = re.compile(r"\b((?:VDD|VIN|POM)[A-Z0-9_]*|GPU|CPU|SOC|CV|VDDRQ|SYS5V) (-?\d+)(?:mW)?/-?\d+")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_TEMPERATURE = re.compile(r"\b([A-Za-z0-9_]+)@(-?\d+(?:\.\d+)?)C\b")
# "GR3D_FREQ 45%@318" (JetPack 6), "0%@[1300,1300]" (7, Orin), "@[1000,1000,1000]" (7, Thor), "45%".
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+))?")


@dataclass(frozen=True)
class Line:
    """What a line says; None and {} where it says nothing.

    Attributes:
        rails: power now by rail, milliwatts.
        ram_mb, ram_total_mb: in use and in all, 2^20 bytes as tegrastats counts.
        celsius: by sensor, in lower case; those switched off are left out.
        gpu_percent: of the time that the GPU worked; Thor gives none while it idles.
        gpu_mhz: clock of its first cluster.
    """

    rails: dict[str, float]
    ram_mb: float | None
    ram_total_mb: float | None
    celsius: dict[str, float]
    gpu_percent: float | None
    gpu_mhz: float | None


def parse(line: str) -> Line:
    """Read one line; what is not known in it is passed over."""
    ram, gpu = _RAM.search(line), _GPU.search(line)
    celsius = {name.lower(): float(value) for name, value in _TEMPERATURE.findall(line)}
    return Line(
        rails={name: float(value) for name, value in _RAIL.findall(line)},
        ram_mb=float(ram[1]) if ram else None,
        ram_total_mb=float(ram[2]) if ram else None,
        celsius={name: value for name, value in celsius.items() if value > -100},
        gpu_percent=float(gpu[1]) if gpu and gpu[1] else None,
        gpu_mhz=float(gpu[2]) if gpu and gpu[2] else None,
    )


def counted(names: Mapping[str, float]) -> tuple[str, ...]:
    """The rails that add up to the whole: the one that everything comes through, else all that are not
    fed from another.

    Sources: VDD_IN and POM_5V_IN are a module's whole input, VIN (an INA238) the whole board's on Thor;
    an AGX Orin has none of them and its VIN_SYS_5V0 is its input and output ports alone.
    """
    for total in TOTALS:
        if total in names:
            return (total,)
    return tuple(name for name in names if PARTS.get(name) not in names)


def total_watts(rails: Mapping[str, float]) -> float | None:
    """Power of the whole from milliwatts by rail; None where there is no rail."""
    return sum(rails[name] for name in counted(rails)) / 1000 if rails else None
