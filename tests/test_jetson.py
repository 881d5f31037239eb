"""The device profile of boards, from files as they are published (fixtures/jetson/README.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlm_edge.benchmarks import machine
from vlm_edge.runtime import jetson
from vlm_edge.runtime.jetson import Jetson, read

FOLDER = Path(__file__).parent / "fixtures" / "jetson"
NANO, AGX = FOLDER / "orin-nano-8gb-jetpack-6", FOLDER / "agx-orin-64gb-jetpack-6"
THOR = FOLDER / "agx-thor-128gb-jetpack-7"


def test_orin_nano() -> None:
    assert read(NANO) == Jetson(
        board="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        module="p3767-0005",
        chip="tegra234",
        l4t="36.4.7",
        jetpack="6.2.1",
        tensorrt="10.3.0.30",
        cuda="12.6",
        power_mode="MAXN_SUPER",
        gpu_mhz=306.0,
        gpu_max_mhz=1020.0,
        cpu_mhz=1510.4,
        cpu_max_mhz=1728.0,
        celsius={"cpu": 46.41, "gpu": 46.03, "soc0": 43.62, "tj": 46.41},  # cv0 is switched off
        throttled=(),
        overcurrent={"oc1": 0, "oc2": 15, "oc3": 37},
        memory_mb=pytest.approx(7990.157312),
        available_mb=pytest.approx(5243.12576),
    )


def test_agx_orin_throttled() -> None:
    found = read(AGX)
    assert found is not None
    assert (found.module, found.l4t, found.jetpack) == ("p3701-0005", "36.4.3", "6.2")
    assert found.power_mode == "MODE_30W"
    assert found.gpu_max_mhz == 612
    assert found.throttled == ("cpu-throttle-alert", "hot-surface-alert")  # the fan slows nothing
    assert found.celsius["tj"] == pytest.approx(99.281)


def test_thor() -> None:
    found = read(THOR)
    assert found is not None
    assert (found.chip, found.module) == ("tegra264", "p3834-0008")
    assert (found.l4t, found.jetpack) == ("38.2.0", "7.0")
    assert (found.tensorrt, found.cuda, found.power_mode) == ("10.13.3.9", "13.0", "120W")
    assert (found.gpu_mhz, found.overcurrent) == (1574, {})
    assert "gpu" not in found.celsius  # gated while idle


def test_another_machine_is_no_jetson(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert machine.throttling(None, tmp_path) is None


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.4.7", "6.2.1"),
        ("38.4.0", "7.1"),
        ("36.9.9", "6"),
        ("39.2.1", "7"),
        ("99.0.0", None),
        (None, None),
    ],
)
def test_jetpack_of_a_release(l4t: str | None, jetpack: str | None) -> None:
    assert jetson.jetpack_of(l4t) == jetpack


def copy(tmp_path: Path) -> Path:
    return shutil.copytree(NANO, tmp_path / "root")


def test_the_package_tells_the_release_where_the_file_does_not(tmp_path: Path) -> None:
    root = copy(tmp_path)
    (root / "etc/nv_tegra_release").unlink()
    found = read(root)
    assert found is not None and found.l4t == "36.4.7"


def test_a_removed_package_is_not_installed() -> None:
    """libnvinfer8's settings were left behind: TensorRT is libnvinfer10's."""
    assert "libnvinfer8" in (NANO / "var/lib/dpkg/status").read_text(encoding="utf-8")
    found = read(NANO)
    assert found is not None and found.tensorrt == "10.3.0.30"


def test_files_that_are_absent_are_unknown(tmp_path: Path) -> None:
    root = copy(tmp_path)
    for name in ("etc", "var", "sys", "proc/meminfo"):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    found = read(root)
    assert found is not None
    assert found.board.startswith("NVIDIA Jetson Orin Nano")
    unknown = (found.l4t, found.jetpack, found.power_mode, found.gpu_mhz, found.memory_mb)
    assert unknown == (None,) * 5
    assert (found.celsius, found.throttled, found.overcurrent) == ({}, (), {})


def test_a_mode_without_a_name(tmp_path: Path) -> None:
    root = copy(tmp_path)
    (root / "etc/nvpmodel.conf").unlink()
    assert jetson.power_mode(root) == "mode 2"


def test_names_before_numbers_in_the_configuration(tmp_path: Path) -> None:
    root = copy(tmp_path)
    conf = root / "etc/nvpmodel.conf"
    conf.write_text("< POWER_MODEL NAME=MAXN ID=2 >\n", encoding="utf-8")
    assert jetson.power_mode(root) == "MAXN"


def test_nvpmodel_is_asked_only_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the running system has no status file; the program is never told to set anything."""
    program = tmp_path / "nvpmodel"
    program.write_text('#!/bin/sh\n[ "$*" = "-q" ] || exit 9\necho "NV Power Mode: 15W"\necho 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/var/lib/nvpmodel/status").exists():
        assert jetson.power_mode() == "15W"
    assert jetson.power_mode(tmp_path) is None  # another root is never asked by program


def test_throttling_between_two_moments(tmp_path: Path) -> None:
    root = copy(tmp_path)
    before = machine.board(root)
    (root / "sys/class/hwmon/hwmon3/oc3_event_cnt").write_text("49\n", encoding="ascii")
    (root / "sys/class/thermal/cooling_device2/cur_state").write_text("1\n", encoding="ascii")
    assert machine.throttling(before, root) == {
        "overcurrent": {"oc3": 12},
        "active": ["gpu-throttle-alert"],
        "celsius": pytest.approx(46.41),
        "gpu_mhz": 306.0,
    }


def test_a_report_names_what_decides_the_figures() -> None:
    about = machine._jetson(read(NANO))
    assert about == {
        "module": "p3767-0005", "chip": "tegra234", "l4t": "36.4.7", "jetpack": "6.2.1",
        "tensorrt": "10.3.0.30", "cuda": "12.6", "power_mode": "MAXN_SUPER", "gpu_max_mhz": 1020.0,
        "cpu_max_mhz": 1728.0,
    }  # fmt: skip
