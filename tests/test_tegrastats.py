"""tegrastats' lines as boards print them; the README beside the fixtures says where each was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_edge.benchmarks.tegrastats import Line, counted, parse, total_watts

FOLDER = Path(__file__).parent / "fixtures" / "jetson" / "tegrastats"


def line(name: str) -> Line:
    return parse((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "watts", "rails"),
    [
        ("orin-nano-jetpack-6", 4.9, ("VDD_IN",)),
        ("orin-nx-super-jetpack-6", 17.946, ("VDD_IN",)),
        # No rail holds all of an AGX Orin; its memory's is fed from VIN_SYS_5V0.
        ("agx-orin-jetpack-6", 3.15 + 14.312 + 4.968, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
        ("agx-orin-jetpack-7", 7.6 + 1.2 + 4.3, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
        ("agx-thor-jetpack-7", 124.486, ("VIN",)),
        ("agx-thor-jetpack-7-idle", 28.906, ("VIN",)),
        ("nano-jetpack-4", 5.336, ("POM_5V_IN",)),
    ],
)
def test_power_of_the_whole(name: str, watts: float, rails: tuple[str, ...]) -> None:
    found = line(name)
    assert counted(found.rails) == rails
    assert total_watts(found.rails) == pytest.approx(watts)


@pytest.mark.parametrize(
    ("name", "percent", "mhz"),
    [
        ("orin-nano-jetpack-6", 26, 306),
        ("orin-nx-super-jetpack-6", 84, 713),
        ("agx-orin-jetpack-6", 14, 407),
        ("agx-orin-jetpack-7", 0, 1300),
        ("agx-thor-jetpack-7", 87, 1574),
        ("agx-thor-jetpack-7-idle", None, 1574),  # no load is printed: it is not 0
        ("nano-jetpack-4", 61, 921),
    ],
)
def test_load_and_clock_of_the_gpu(name: str, percent: float | None, mhz: float) -> None:
    found = line(name)
    assert (found.gpu_percent, found.gpu_mhz) == (percent, mhz)


def test_memory_and_temperatures() -> None:
    found = line("orin-nano-jetpack-6")
    assert (found.ram_mb, found.ram_total_mb) == (3172, 6284)
    assert found.celsius == {
        "cpu": 46.41, "soc2": 45.34, "soc0": 43.62, "gpu": 46.03, "tj": 46.41, "soc1": 44.38,
    }  # fmt: skip
    assert line("agx-orin-jetpack-6").celsius["tboard"] == 62
    assert line("agx-thor-jetpack-7").celsius["gpu"] == 56.937  # now, not the most so far
    assert parse("cv0@-256C cpu@50C").celsius == {"cpu": 50}  # switched off


def test_the_value_now_is_taken_not_the_mean() -> None:
    assert line("agx-thor-jetpack-7").rails == {
        "VDD_GPU": 37939, "VDD_CPU_SOC_MSS": 30059, "VIN_SYS_5V0": 15486, "VIN": 124486,
    }  # fmt: skip


def test_clocks_and_temperatures_are_no_rails() -> None:
    assert parse("VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CPU@77C GPU@69C").rails == {}


def test_other_text_says_nothing() -> None:
    assert parse("tegrastats: command not found") == Line({}, None, None, {}, None, None)
    assert total_watts({}) is None


def test_a_partial_rail_counts_where_its_whole_is_absent() -> None:
    assert counted({"VDD_GPU_SOC": 1, "VDDQ_VDD2_1V8AO": 1}) == ("VDD_GPU_SOC", "VDDQ_VDD2_1V8AO")
